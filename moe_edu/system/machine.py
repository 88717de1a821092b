"""Facts about this machine: its parts, the device to compute on, the memory used, and advice for the lessons."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import torch

_OLDEST_TORCH = (2, 10)
# Where Linux containers (Binder, Colab, Docker) find their memory limit: control groups, versions 2 and 1.
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Machine(NamedTuple):
    """A machine's hardware and software.

    Attributes:
        python: version of Python.
        torch: version of PyTorch.
        system: operating system and kernel.
        processor: name of the processor.
        cores: CPU cores that this process may use.
        threads: CPU threads that PyTorch uses.
        memory_gb: memory that this process may use, in GB (10^9 bytes); None where the system does not report it.
        gpu: name of the NVIDIA GPU that PyTorch can use; None without one.
        gpu_memory_gb: the GPU's memory in GB; None without one.
    """

    python: str
    torch: str
    system: str
    processor: str
    cores: int
    threads: int
    memory_gb: float | None
    gpu: str | None = None
    gpu_memory_gb: float | None = None


def this_machine() -> Machine:
    """The machine that this process runs on."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return Machine(
        python=platform.python_version(),
        torch=torch.__version__,
        system=platform.platform(terse=True),
        processor=_processor_name(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_gb=_usable_memory_gb(),
        gpu=gpu.name if gpu else None,
        gpu_memory_gb=gpu.total_memory / 1e9 if gpu else None,
    )


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def advise(machine: Machine) -> tuple[str, ...]:
    """What readers of the lessons should know about their machine, in plain sentences."""
    sentences = []
    if tuple(int(number) for number in machine.torch.split(".")[:2]) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        sentences.append(f"PyTorch {machine.torch} is too old: install {oldest} or newer.")
    if machine.cores == 1:
        sentences.append("One CPU core is enough for every lesson; other programs will slow it down.")
    else:
        sentences.append(f"{machine.cores} CPU cores are more than enough: a lesson computes on one.")
    if machine.memory_gb is None:
        sentences.append("Your system does not report how much memory it has; a lesson needs 1 GB.")
    elif machine.memory_gb < 1:
        sentences.append(
            f"{machine.memory_gb:.1f} GB of memory is little: close other programs, and expect the system to stop "
            "lessons 7 to 9. Binder and Colab have more."
        )
    elif machine.memory_gb < 3:
        sentences.append(
            f"{machine.memory_gb:.1f} GB of memory is enough for one lesson at a time: shut down its kernel before "
            "you open the next."
        )
    else:
        sentences.append(f"{machine.memory_gb:.0f} GB of memory is plenty: a lesson needs 1 GB.")
    if machine.gpu is None:
        sentences.append("PyTorch finds no GPU, and you need none.")
    else:
        sentences.append(
            f"Training will use your {machine.gpu}, with {machine.gpu_memory_gb:.0f} GB of its own memory."
        )
    return tuple(sentences)


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():  # on Linux, platform.processor() is empty; some ARM machines list no model name
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_memory_gb() -> float | None:
    """The machine's memory, or its container's limit if that is lower."""
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= getattr(os, "sysconf_names", {}).keys():
        return None  # Windows
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _MEMORY_LIMITS:
        path = Path(name)
        if path.is_file() and (limit := path.read_text("ascii").strip()).isdigit():
            sizes.append(int(limit))
    return min(sizes) / 1e9


def resolve_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the NVIDIA GPU where there is one, else the CPU.

    Raises:
        ValueError: `name` is no device that this package computes on, or a GPU on a machine without one.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is not a device: use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"moe_edu does not compute on {name!r}: use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "this PyTorch finds no NVIDIA GPU: choose device cpu, or install a CUDA build of PyTorch "
            "(on Colab: Runtime > Change runtime type > GPU)"
        )
    return device


def status_mb(field: str) -> float:
    """A size that Linux records for this process, such as VmRSS, in MB (10^6 bytes).

    Raises:
        OSError: this system does not record it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {field}: memory cannot be measured on this system")


def peak_memory_mb() -> float | None:
    """Peak resident memory of this process so far, in MB (10^6 bytes); None on Windows, which does not report it."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":
        # Not getrusage: a process inherits its peak from the process that started it.
        return status_mb("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, other systems kilobytes.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
