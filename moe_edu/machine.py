"""What this machine is and has: the device to compute on, and the memory used."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def resolve_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the NVIDIA GPU where there is one, else the CPU.

    Raises:
        ValueError: not the name of a device, or a GPU where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device: use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "there is no NVIDIA GPU that this PyTorch can use: choose device cpu, or install a CUDA build of PyTorch "
            "(on Colab: Runtime > Change runtime type > GPU)"
        )
    return device


def peak_memory_mb() -> float | None:
    """The largest resident memory of this process so far, in MB (10^6 bytes); None on Windows, which does not say."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":
        # Not getrusage, whose peak a process inherits from the one that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, other systems kilobytes.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
