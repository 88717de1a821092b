"""Wall-clock times of several functions, measured in turn, so that a busy moment hits them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, the fastest and the slowest of `repeats`."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    repeats: int


def time_in_turn(
    functions: Mapping[str, Callable[[], object]], repeats: int, seconds_each: float = 30.0
) -> dict[str, Timing]:
    """Call the functions in turn, A B A B ..., and time each call.

    A function sits out the rounds after it has used `seconds_each`, so that a very slow one is timed less often. Call
    each once before, so that caches are warm and libraries loaded.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if sum(milliseconds[name]) < seconds_each * 1e3:
                start = time.perf_counter()
                function()
                milliseconds[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: Timing(statistics.median(times), min(times), max(times), len(times))
        for name, times in milliseconds.items()
    }
