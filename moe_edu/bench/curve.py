"""What one sparse layer costs as its experts or its tokens grow: two curves that share a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_edu.bench.contenders import LayerSize
from moe_edu.bench.layer import LayerResult


class Curve(NamedTuple):
    """Results along one axis, E or T, with the other sizes fixed."""

    title: str
    x_title: str
    points: Mapping[int, LayerResult]


def curve_sizes(
    experts: Sequence[int], tokens: Sequence[int], at_experts: int, at_tokens: int, d_model: int, ffn_dim: int
) -> list[LayerSize]:
    """The sizes to measure: each E with `at_tokens` tokens, each T with `at_experts` experts, without repeats."""
    pairs = [(at_tokens, E) for E in experts] + [(T, at_experts) for T in tokens]
    return [LayerSize(T, E, d_model, ffn_dim) for T, E in dict.fromkeys(pairs)]


def make_curves(results: Sequence[LayerResult], at_experts: int, at_tokens: int) -> list[Curve]:
    """The curve over E and the curve over T, for each mode."""
    curves = []
    for mode in dict.fromkeys(result.mode for result in results):
        of_mode = [result for result in results if result.mode == mode]
        over_experts = {r.size.experts: r for r in of_mode if r.size.tokens == at_tokens}
        over_tokens = {r.size.tokens: r for r in of_mode if r.size.experts == at_experts}
        curves.append(Curve(f"{mode}, {at_tokens:,} tokens", "experts", over_experts))
        curves.append(Curve(f"{mode}, {at_experts} experts", "tokens", over_tokens))
    return curves


def format_curve(curve: Curve) -> str:
    """How time and extra memory grow from one end of the curve to the other."""
    first, last = min(curve.points), max(curve.points)
    ends = curve.points[first], curve.points[last]
    times = [result.ours.timing.median_ms for result in ends]
    limits = [result.roofline_ms for result in ends]
    line = (
        f"{curve.title}: {last / first:g} times as many {curve.x_title} ({first:,} to {last:,}) take "
        f"{times[1] / times[0]:.2f} times the time (the roofline {limits[1] / limits[0]:.2f})"
    )
    memory = [result.extra_mb for result in ends]
    if memory[0] and memory[1]:
        line += f" and {memory[1] / memory[0]:.2f} times the extra memory"
    return line
