"""Peak extra memory of one call: on the CPU as the system reports it to a fresh process, on a GPU as PyTorch does."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from moe_edu.system.machine import status_mb

P = ParamSpec("P")
R = TypeVar("R")

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def can_measure_memory() -> bool:
    """Only Linux lets a process read and reset its peak."""
    return _STATUS.exists() and _CLEAR_REFS.exists()


def peak_extra_mb(call: Callable[[], object]) -> float:
    """How far resident memory rises above its current level during `call`, in MB (10^6 bytes).

    Memory that an earlier call freed may still be resident and be reused unnoticed: measure in a fresh process.
    """
    _CLEAR_REFS.write_text("5")  # resets VmHWM, see proc(5)
    before = status_mb("VmRSS")
    result = call()  # held until the peak is read
    extra = status_mb("VmHWM") - before
    del result
    return extra


def cuda_peak_extra_mb(call: Callable[[], object]) -> float:
    """How far PyTorch's GPU memory rises above its current level during `call`, in MB (10^6 bytes)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function(...)` in a new process, which inherits no allocator, cache or thread from this one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()
