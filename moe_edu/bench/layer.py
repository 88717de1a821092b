"""The sparse layer against the reference and against the machine's limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from moe_edu.bench.contenders import (
    Contender,
    LayerSize,
    dense_layer,
    our_layer,
    reference_is_here,
    reference_layer,
)
from moe_edu.bench.exact import exact_step, forward_error, gradient_error
from moe_edu.bench.memory import can_measure_memory, in_fresh_process, peak_extra_mb
from moe_edu.bench.timing import Timing, time_in_turn
from moe_edu.layers import SparseMLP

Mode = Literal["inference", "training"]
MODES: tuple[Mode, ...] = ("inference", "training")

OURS, REFERENCE = "moe_edu", "transformers"

# Largest relative deviation from the float64 loop. That of gradients leaves room for ReLU's kink.
TOLERANCE: dict[torch.dtype, dict[Mode, float]] = {
    torch.float32: {"inference": 1e-5, "training": 1e-2},
    torch.bfloat16: {"inference": 2e-2, "training": 1e-1},
}

# Far more than any cache holds, so that the copy measures memory.
_COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Measured:
    """One contender: its time, its peak extra memory (None where not measured), its deviation from float64."""

    timing: Timing
    peak_mb: float | None
    error: float


@dataclass(frozen=True)
class LayerResult:
    """One size in one mode.

    Attributes:
        ours, reference: what was measured; `reference` is None where it is not installed or not comparable.
        dense: the dense feed-forward network over as many rows as the experts were given.
        copy_gb_s: the machine's copy bandwidth, bytes read plus bytes written, measured in the same rounds.
        weight_mb: weights of the experts that were given rows.
        gradient_mb: gradients of all parameters, part of every contender's `peak_mb` in training; 0 in inference.
    """

    size: LayerSize
    mode: Mode
    ours: Measured
    reference: Measured | None
    dense: Timing
    copy_gb_s: float
    weight_mb: float
    gradient_mb: float

    @property
    def memory_limit_ms(self) -> float:
        """Inference reads each touched weight once; training reads it twice and writes its gradient once."""
        passes = 1 if self.mode == "inference" else 3
        return passes * self.weight_mb / self.copy_gb_s

    @property
    def roofline_ms(self) -> float:
        """No layer that multiplies these rows with these weights is expected to be faster than this."""
        return max(self.dense.median_ms, self.memory_limit_ms)

    @property
    def roofline_share(self) -> float:
        return self.roofline_ms / self.ours.timing.median_ms

    @property
    def speedup(self) -> float | None:
        """How many times the reference's speed."""
        if self.reference is None:
            return None
        return self.reference.timing.median_ms / self.ours.timing.median_ms

    @property
    def memory_ratio(self) -> float | None:
        """Our peak extra memory over the reference's, in training without the gradients that both must hold."""
        if self.reference is None or self.reference.peak_mb is None or self.ours.peak_mb is None:
            return None
        return (self.ours.peak_mb - self.gradient_mb) / (self.reference.peak_mb - self.gradient_mb)


def run_layer_bench(
    sizes: Iterable[LayerSize],
    *,
    modes: tuple[Mode, ...] = MODES,
    repeats: int = 7,
    dtype: torch.dtype = torch.float32,
    memory: bool = True,
    seconds_each: float = 30.0,
    seed: int = 0,
) -> Iterator[LayerResult]:
    """Measure each size in each mode on the CPU, one result as soon as it is there.

    Every contender gets the same weights, tokens and routing, and is checked against a float64 loop before it is timed:
    the output, and in training the gradients of the tokens, of the router and of the first expert. Contenders run in
    turn; one that has used `seconds_each` sits out the remaining rounds. Peak memory is measured in fresh processes, so
    a script that calls this needs the guard `if __name__ == "__main__":`.

    Raises:
        ArithmeticError: a contender's result is wrong.
        KeyError: `dtype` is neither float32 nor bfloat16.
    """
    for size in sizes:
        for mode in modes:
            yield _run_one(size, mode, repeats, dtype, memory and can_measure_memory(), seconds_each, seed)


def _run_one(
    size: LayerSize,
    mode: Mode,
    repeats: int,
    dtype: torch.dtype,
    memory: bool,
    seconds_each: float,
    seed: int,
) -> LayerResult:
    layer, hidden, upstream = _make_problem(size, mode, dtype, seed)
    contenders = {name: _make_contender(name, layer) for name in _names(dtype)}
    with torch.no_grad():
        routing = layer.router(hidden)
    errors = _check(contenders, mode, exact_step(layer, hidden, routing, upstream), hidden, upstream)

    kept = int(routing.kept.sum())
    touched = int(routing.expert_index[routing.kept].unique().numel())
    calls = {
        name: _call(contender.module, contender.forward, mode, hidden, upstream)
        for name, contender in contenders.items()
    }
    dense = dense_layer(size, dtype)
    rows = torch.randn(kept, size.d_model).to(dtype)
    calls["dense"] = _call(dense, dense, mode, rows, torch.ones_like(rows))
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    calls["copy"] = partial(torch.empty_like(source).copy_, source)
    calls["dense"]()
    calls["copy"]()
    timings = time_in_turn(calls, repeats, seconds_each)

    peaks = {
        name: in_fresh_process(measure_peak, size, mode, dtype, name, torch.get_num_threads(), seed)
        if memory
        else None
        for name in contenders
    }
    measured = {name: Measured(timings[name], peaks[name], errors[name]) for name in contenders}
    parameters_mb = sum(p.numel() * p.element_size() for p in layer.parameters()) / 1e6
    expert_mb = sum(p[0].numel() * p.element_size() for p in layer.experts.parameters()) / 1e6
    return LayerResult(
        size=size,
        mode=mode,
        ours=measured[OURS],
        reference=measured.get(REFERENCE),
        dense=timings["dense"],
        copy_gb_s=2 * _COPY_BYTES / 1e6 / timings["copy"].median_ms,
        weight_mb=touched * expert_mb,
        gradient_mb=parameters_mb if mode == "training" else 0.0,
    )


def _check(
    contenders: dict[str, Contender], mode: Mode, exact: list[Tensor], hidden: Tensor, upstream: Tensor
) -> dict[str, float]:
    """Each contender's deviation from the float64 loop. Warms it up, too."""
    errors = {}
    for name, contender in contenders.items():
        if mode == "inference":
            errors[name] = forward_error(contender, hidden, exact)
        else:
            errors[name] = gradient_error(contender, hidden, upstream, exact)
        if not errors[name] <= TOLERANCE[hidden.dtype][mode]:
            raise ArithmeticError(f"{name} deviates from the float64 loop by {errors[name]:.1e} in {mode}")
    return errors


def measure_peak(
    size: LayerSize, mode: Mode, dtype: torch.dtype, name: str, threads: int, seed: int
) -> float:
    """Peak extra memory of one call of the contender `name`, in MB; meant for a fresh process."""
    torch.set_num_threads(threads)
    layer, hidden, upstream = _make_problem(size, mode, dtype, seed)
    contender = _make_contender(name, layer)
    # A small call first: what the libraries load and keep is not the layer's. Its gradients are freed again.
    _call(contender.module, contender.forward, mode, hidden[:, :2], upstream[:, :2])()
    contender.module.zero_grad(set_to_none=True)
    return peak_extra_mb(_call(contender.module, contender.forward, mode, hidden, upstream))


def _make_problem(
    size: LayerSize, mode: Mode, dtype: torch.dtype, seed: int
) -> tuple[SparseMLP, Tensor, Tensor]:
    """The layer, its `[1, T, D]` input, and the gradient of its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = SparseMLP(size.config()).to(dtype).train(mode == "training")
        hidden, upstream = torch.randn(2, 1, size.tokens, size.d_model).to(dtype)
    return layer, hidden, upstream


def _names(dtype: torch.dtype) -> list[str]:
    """The contenders that can be compared here."""
    # In bf16 the reference rounds its probabilities before it compares them, and so routes otherwise.
    comparable = dtype == torch.float32 and reference_is_here() is None
    return [OURS, REFERENCE] if comparable else [OURS]


def _make_contender(name: str, layer: SparseMLP) -> Contender:
    return our_layer(layer) if name == OURS else reference_layer(layer)


def _call(
    module: nn.Module, forward: Callable[[Tensor], Tensor], mode: Mode, inputs: Tensor, upstream: Tensor
) -> Callable[[], Tensor]:
    """One inference, or one forward and backward pass with fresh gradients."""

    def infer() -> Tensor:
        with torch.no_grad():
            return forward(inputs)

    def train() -> Tensor:
        module.zero_grad(set_to_none=True)
        output = forward(inputs.detach().requires_grad_())
        output.backward(upstream)
        return output.detach()

    return infer if mode == "inference" else train
