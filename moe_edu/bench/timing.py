"""Times of several functions, measured in turn, so that a busy moment affects them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Clock = Callable[[Callable[[], object]], float]  # milliseconds of one call


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, the fastest and the slowest of `repeats`."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    repeats: int


def wall_ms(function: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def cuda_ms(function: Callable[[], object]) -> float:
    """From the first to the last kernel of one call, on the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_in_turn(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    seconds_each: float = 30.0,
    clock: Clock = wall_ms,
) -> dict[str, Timing]:
    """Call the functions in turn, A B A B ..., and time each call.

    A function that has used `seconds_each` skips the remaining rounds, so that a very slow one is timed less often.
    Call each once beforehand, so that caches are warm and libraries are loaded.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if sum(milliseconds[name]) < seconds_each * 1e3:
                milliseconds[name].append(clock(function))
    return {
        name: Timing(statistics.median(times), min(times), max(times), len(times))
        for name, times in milliseconds.items()
    }
