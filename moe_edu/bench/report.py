"""Benchmark results as text and as JSON, with the machine that they come from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_edu.bench.layer import OURS, LayerResult
from moe_edu.bench.timing import Timing
from moe_edu.system.machine import Machine

_HEADER = (
    f"{'mode':9} {'dtype':8} {'E':>4} {'T':>6} {'D':>5}  {'contender':26} {'ms [fastest-slowest]':>24} {'speedup':>8} "
    f"{'MB':>7} {'error':>7} {'dense ms':>9} {'of dense':>8} {'roofline':>9} {'share':>6}"
)
_INDENT = " " * 38


def format_machine(machine: Machine) -> str:
    gpu = f"; {machine.gpu}" if machine.gpu else ""
    return (
        f"{machine.processor}, {machine.cores} cores, {machine.threads} threads{gpu}; torch {machine.torch}, "
        f"Python {machine.python}, {machine.system}"
    )


def format_missing(missing: Mapping[str, str]) -> str:
    """One line for each contender that cannot be compared here."""
    return "\n".join(f"{name} is left out: {reason}" for name, reason in missing.items())


def format_header() -> str:
    return _HEADER


def format_row(result: LayerResult) -> str:
    """Our line of the table, then one line for each other contender."""
    ours, size = result.ours, result.size
    lines = [
        f"{result.mode:9} {result.dtype:8} {size.experts:4} {size.tokens:6} {size.d_model:5}  {OURS:26} "
        f"{_spread(ours.timing):>24} {'':8} {_number(ours.peak_mb, '.0f'):>7} {ours.error:7.0e} "
        f"{result.dense.median_ms:9.1f} {result.of_dense:8.2f} {result.roofline_ms:9.1f} {result.roofline_share:6.2f}"
    ]
    for name, other in result.others.items():
        lines.append(
            f"{_INDENT}{name:26} {_spread(other.timing):>24} {result.speedup(name):7.2f}x "
            f"{_number(other.peak_mb, '.0f'):>7} {other.error:7.0e}"
        )
    lines += [f"{_INDENT}{name:26} left out: {reason}" for name, reason in result.left_out.items()]
    return "\n".join(lines)


def format_summary(results: Sequence[LayerResult]) -> str:
    """What the columns mean, and figures over all sizes."""
    if not results:
        return "nothing was measured"
    lines = [
        "Medians; contenders run in turn. Speedup: its time / ours. Dense: the dense network over as many rows; of",
        "dense: dense / moe_edu. Roofline: the larger of dense and moving each touched weight at the copy bandwidth",
        "measured here (read once in inference; read twice and its gradient written once in training). Share: roofline",
        "/ moe_edu. MB: peak memory above the level before the call; in training it includes the gradients.",
    ]
    for mode in dict.fromkeys(result.mode for result in results):
        of_mode = [result for result in results if result.mode == mode]
        for title, values in (
            ("share of the roofline", [result.roofline_share for result in of_mode]),
            ("of the dense network's speed", [result.of_dense for result in of_mode]),
        ):
            lines.append(
                f"{mode}: {title} {statistics.median(values):.2f} in the median, at least {min(values):.2f}"
            )
        for name in dict.fromkeys(name for result in of_mode for name in result.others):
            beside = [result for result in of_mode if name in result.others]
            speedups = [result.speedup(name) for result in beside]
            line = f"{mode}: {min(speedups):.2f} to {max(speedups):.2f} times the speed of {name}"
            ratios = [ratio for result in beside if (ratio := result.memory_ratio(name)) is not None]
            if ratios:
                line += f", {min(ratios):.3f} to {max(ratios):.3f} of its memory (without gradients)"
            lines.append(line)
    return "\n".join(lines)


def write_json(path: Path, machine: Machine, **parts: Any) -> None:
    """Write the machine and the parts of a benchmark: every number in its table, and those it comes from."""
    document = {"machine": machine._asdict(), **parts}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def layer_result_to_dict(result: LayerResult) -> dict[str, Any]:
    """The measurements, and what is derived from them."""
    derived = ("memory_limit_ms", "roofline_ms", "roofline_share", "of_dense")
    beside = {
        name: {"speedup": result.speedup(name), "memory_ratio": result.memory_ratio(name)}
        for name in result.others
    }
    return asdict(result) | {name: getattr(result, name) for name in derived} | {"beside": beside}


def _spread(timing: Timing) -> str:
    return f"{timing.median_ms:.1f} [{timing.fastest_ms:.1f}-{timing.slowest_ms:.1f}]"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else f"{value:{spec}}"
