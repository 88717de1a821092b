"""The pictures of the layer and model benchmarks: results as rows of marks or as curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_edu.bench.curve import Curve
from moe_edu.bench.layer import OURS, LayerResult
from moe_edu.bench.plot import Panel, Row, Sample, curves_svg, dots_svg
from moe_edu.bench.report import format_machine
from moe_edu.bench.timing import Timing
from moe_edu.system.machine import Machine

if TYPE_CHECKING:  # it imports the corpus
    from moe_edu.bench.model import ModelResult

_MS = "milliseconds per call: median, fastest to slowest"


def layer_svg(results: Sequence[LayerResult], machine: Machine) -> str:
    """Every contender's time in every size and mode."""
    rows = []
    for result in results:
        size = result.size
        samples = {OURS: _sample(result.ours.timing), "roofline": Sample(result.roofline_ms)}
        samples["dense, same work"] = _sample(result.dense)
        samples |= {name: _sample(other.timing) for name, other in result.others.items()}
        label = f"{result.mode}, {result.dtype}, E={size.experts}, T={size.tokens}, D={size.d_model}"
        rows.append(Row(label, samples))
    return dots_svg("One sparse layer", format_machine(machine), _MS, rows)


def curve_svg(curves: Sequence[Curve], machine: Machine) -> str:
    """Time and extra memory along each curve."""
    panels = []
    for curve in curves:
        points = curve.points
        times = {
            OURS: {x: _sample(result.ours.timing) for x, result in points.items()},
            "roofline": {x: Sample(result.roofline_ms) for x, result in points.items()},
            "dense, same work": {x: _sample(result.dense) for x, result in points.items()},
        }
        panels.append(Panel(curve.title, curve.x_title, "milliseconds per call", times))
    for curve in curves:
        # A logarithmic axis shows only positive values.
        memory = {x: Sample(r.extra_mb) for x, r in curve.points.items() if r.extra_mb and r.extra_mb > 0}
        if memory:
            panels.append(Panel(curve.title, curve.x_title, "extra MB, without gradients", {OURS: memory}))
    return curves_svg("Cost of one sparse layer", format_machine(machine), panels)


def model_svg(result: ModelResult, machine: Machine) -> str:
    """Training and generation of both contenders."""
    parts = {"training": result.training, f"generation, {result.beams} beams": result.generation}
    rows = [
        Row(label, {OURS: _sample(part.ours), "transformers": _sample(part.reference)})
        for label, part in parts.items()
    ]
    return dots_svg("The small translator", format_machine(machine), _MS, rows)


def _sample(timing: Timing) -> Sample:
    return Sample(timing.median_ms, timing.fastest_ms, timing.slowest_ms)
