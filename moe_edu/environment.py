"""What `moe-edu env` prints: the facts that a bug report needs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from moe_edu import __version__, explain_backend
from moe_edu.config import MoEConfig
from moe_edu.kernels.compiled import vector_bits, why_not_compiled
from moe_edu.moe.experts import Experts
from moe_edu.system.machine import resolve_device, this_machine
from moe_edu.system.requirements import find_missing

EXTRAS = ("lessons", "lab", "site", "test")


def describe_environment() -> str:
    """One line per fact, beginning with its name."""
    machine, device = this_machine(), resolve_device()
    memory = "unknown" if machine.memory_gb is None else f"{machine.memory_gb:.1f} GB"
    why_not = why_not_compiled(torch.float32)
    experts = Experts(MoEConfig(d_model=64, encoder_ffn_dim=64, num_experts=8)).to(device)
    facts = {
        "moe_edu": __version__,
        "Python": machine.python,
        "PyTorch": machine.torch,
        "transformers": _version_of("transformers"),
        "system": machine.system,
        "processor": f"{machine.processor}, {machine.cores} cores, {machine.threads} threads",
        "memory": memory,
        "compiled code": why_not or f"{vector_bits()} bits at once",
        "device": f"{device} ({machine.gpu}, {machine.gpu_memory_gb:.0f} GB)" if machine.gpu else str(device),
    }
    for dtype in (torch.float32, torch.bfloat16):
        choice = explain_backend(experts, dtype)
        facts[f"back end, {str(dtype).removeprefix('torch.')}"] = f"{choice.backend}: {choice.reason}"
    for extra in EXTRAS:
        missing = find_missing(extra)
        facts[f"extra {extra}"] = f"without {', '.join(missing)}" if missing else "complete"
    return "\n".join(f"{name + ':':20} {fact}" for name, fact in facts.items())


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
