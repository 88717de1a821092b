"""Benchmark results as text and as JSON, with the machine they come from."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_edu.bench.layer import LayerResult
from moe_edu.bench.timing import Timing

_HEADER = (
    f"{'mode':9} {'E':>4} {'T':>6} {'moe_edu ms':>22} {'transformers ms':>25} {'speedup':>8} {'dense ms':>9} "
    f"{'roofline':>9} {'share':>6} {'MB':>7} {'ref MB':>7} {'error':>7}"
)


@dataclass(frozen=True)
class Machine:
    """Where the numbers come from."""

    processor: str
    cores: int
    threads: int
    torch: str
    python: str
    system: str


def this_machine() -> Machine:
    return Machine(
        processor=_processor_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=platform.platform(terse=True),
    )


def format_machine(machine: Machine) -> str:
    return (
        f"{machine.processor}, {machine.cores} cores, {machine.threads} threads; torch {machine.torch}, "
        f"Python {machine.python}, {machine.system}"
    )


def format_header() -> str:
    return _HEADER


def format_row(result: LayerResult) -> str:
    """One line of the table: medians, with the fastest and slowest call in brackets."""
    reference = result.reference
    return (
        f"{result.mode:9} {result.size.experts:4} {result.size.tokens:6} {_spread(result.ours.timing):>22} "
        f"{_spread(reference.timing) if reference else '-':>25} {_number(result.speedup, '.2f', 'x'):>8} "
        f"{result.dense.median_ms:9.1f} {result.roofline_ms:9.1f} {result.roofline_share:6.2f} "
        f"{_number(result.ours.peak_mb, '.0f'):>7} {_number(reference.peak_mb if reference else None, '.0f'):>7} "
        f"{result.ours.error:7.0e}"
    )


def format_summary(results: Sequence[LayerResult]) -> str:
    """What the columns mean, and the figures over all sizes."""
    if not results:
        return "nothing was measured"
    lines = [
        "Medians [fastest-slowest], every contender in turn. Share: roofline / moe_edu. Roofline: the larger of the",
        "dense network over as many rows, and moving each touched weight at the copy bandwidth measured here (read",
        "once in inference; read twice and its gradient written once in training). MB: peak resident memory above",
        "the level before the call, in a fresh process; in training it includes the gradients.",
    ]
    for mode in dict.fromkeys(result.mode for result in results):
        of_mode = [result for result in results if result.mode == mode]
        shares = [result.roofline_share for result in of_mode]
        lines.append(
            f"{mode}: share of the roofline {statistics.median(shares):.2f} in the median, {min(shares):.2f} at least"
        )
        speedups = [result.speedup for result in of_mode if result.speedup is not None]
        ratios = [result.memory_ratio for result in of_mode if result.memory_ratio is not None]
        if speedups:
            lines[-1] += f"; {min(speedups):.2f} to {max(speedups):.2f} times the reference's speed"
        if ratios:
            lines[-1] += f"; {min(ratios):.3f} to {max(ratios):.3f} of its memory (without gradients)"
    return "\n".join(lines)


def write_json(path: Path, machine: Machine, results: Sequence[LayerResult]) -> None:
    """Every number of the table, and those behind it."""
    document = {"machine": asdict(machine), "results": [_to_dict(result) for result in results]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _to_dict(result: LayerResult) -> dict[str, Any]:
    derived = ("memory_limit_ms", "roofline_ms", "roofline_share", "speedup", "memory_ratio")
    return asdict(result) | {name: getattr(result, name) for name in derived}


def _spread(timing: Timing) -> str:
    return f"{timing.median_ms:.1f} [{timing.fastest_ms:.0f}-{timing.slowest_ms:.0f}]"


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
