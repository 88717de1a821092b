"""The sparse layer compared with other libraries' layers and with the machine's limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from moe_edu.bench.contenders import Contender, LayerSize, dense_layer, our_layer
from moe_edu.bench.exact import exact_step, forward_error, gradient_error
from moe_edu.bench.libraries import REFERENCE, reference_layer, st_moe, transformers_experts
from moe_edu.bench.memory import can_measure_memory, cuda_peak_extra_mb, in_fresh_process, peak_extra_mb
from moe_edu.bench.timing import Timing, cuda_ms, time_in_turn, wall_ms
from moe_edu.moe.layer import SparseMLP

Mode = Literal["inference", "training"]
MODES: tuple[Mode, ...] = ("inference", "training")

Factory = Callable[[SparseMLP], Contender]

OURS = "moe_edu"
LIBRARIES: Mapping[str, Factory] = {
    REFERENCE: reference_layer,
    "transformers 5, eager": partial(transformers_experts, "eager"),
    "transformers 5, grouped": partial(transformers_experts, "grouped_mm"),
    "st-moe-pytorch": st_moe,
}

# The largest relative deviation from the float64 loop. For gradients it leaves room for ReLU's kink.
TOLERANCE: dict[torch.dtype, dict[Mode, float]] = {
    torch.float32: {"inference": 1e-5, "training": 1e-2},
    torch.float16: {"inference": 5e-3, "training": 5e-2},
    torch.bfloat16: {"inference": 2e-2, "training": 1e-1},
}

# Far larger than any cache, so that the copy measures memory.
_COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Measured:
    """One contender: its time, its peak extra memory (None if not measured) and its deviation from float64."""

    timing: Timing
    peak_mb: float | None
    error: float


@dataclass(frozen=True)
class LayerResult:
    """One size in one mode.

    Attributes:
        ours: the measurements of this package's sparse layer.
        others: those of the other contenders, by name.
        left_out: why a contender was not measured, by name.
        dense: the dense feed-forward network over as many rows as the experts got.
        copy_gb_s: the machine's copy bandwidth, bytes read plus bytes written, measured in the same rounds.
        weight_mb: weights of the experts that got rows.
        gradient_mb: gradients of all parameters, part of every contender's `peak_mb` in training; 0 in inference.
    """

    size: LayerSize
    mode: Mode
    dtype: str
    ours: Measured
    others: Mapping[str, Measured]
    left_out: Mapping[str, str]
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
        """The expected lower bound on the time of any layer that multiplies these rows by these weights."""
        return max(self.dense.median_ms, self.memory_limit_ms)

    @property
    def roofline_share(self) -> float:
        return self.roofline_ms / self.ours.timing.median_ms

    @property
    def of_dense(self) -> float:
        """Our speed as a share of the dense network's."""
        return self.dense.median_ms / self.ours.timing.median_ms

    @property
    def extra_mb(self) -> float | None:
        """Our peak extra memory without the gradients of the parameters; None if it was not measured."""
        return None if self.ours.peak_mb is None else self.ours.peak_mb - self.gradient_mb

    def speedup(self, name: str) -> float:
        """Our speed as a multiple of another contender's."""
        return self.others[name].timing.median_ms / self.ours.timing.median_ms

    def memory_ratio(self, name: str) -> float | None:
        """Our peak extra memory over another's; in training, without the gradients that both must hold."""
        other = self.others[name].peak_mb
        if self.extra_mb is None or other is None or other <= self.gradient_mb:
            return None
        return self.extra_mb / (other - self.gradient_mb)


def run_layer_bench(
    sizes: Iterable[LayerSize],
    *,
    contenders: Mapping[str, Factory] = LIBRARIES,
    modes: tuple[Mode, ...] = MODES,
    repeats: int = 7,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    memory: bool = True,
    seconds_each: float = 30.0,
    seed: int = 0,
) -> Iterator[LayerResult]:
    """Measure our layer and the other contenders; yield the result of each size in each mode once it is measured.

    All get the same weights, tokens and routing, and are checked against a float64 loop before they are timed: the
    output, and in training the gradients of the tokens, of the router and of the first expert. They run in turn; one
    that has used `seconds_each` skips the remaining rounds. A contender that is not installed, fails or is wrong is
    left out. On the CPU peak memory is measured in fresh processes, so a script that calls this function needs the
    guard `if __name__ == "__main__":`.

    Raises:
        ArithmeticError: our own result is wrong.
        KeyError: there is no tolerance for `dtype`.
    """
    for size in sizes:
        for mode in modes:
            case = Case(size, mode, dtype, torch.device(device), seed)
            yield _measure(case, contenders, repeats, memory, seconds_each)


def explain_missing(contenders: Mapping[str, Factory], dtype: torch.dtype, device: str) -> dict[str, str]:
    """Why some contenders cannot be compared here, by name, as a test with a tiny layer shows."""
    layer, _, _ = make_problem(Case(LayerSize(8, 2, 128, 128), "inference", dtype, torch.device(device)))
    return _make_all(contenders, layer)[1]


@dataclass(frozen=True)
class Case:
    """The problem on which every contender is measured."""

    size: LayerSize
    mode: Mode
    dtype: torch.dtype
    device: torch.device
    seed: int = 0


def make_problem(case: Case) -> tuple[SparseMLP, Tensor, Tensor]:
    """The layer, its `[1, T, D]` input, and the gradient of its output."""
    size = case.size
    # Directly on the device: drawing the largest layer's weights on the processor takes many seconds.
    with torch.random.fork_rng(devices=[case.device] if case.device.type == "cuda" else []), case.device:
        torch.manual_seed(case.seed)
        layer = SparseMLP(size.config()).to(case.dtype).train(case.mode == "training")
        hidden, upstream = torch.randn(2, 1, size.tokens, size.d_model).to(case.dtype)
    return layer, hidden, upstream


def measure_peak(case: Case, make: Factory, threads: int) -> float:
    """Peak extra memory of one call of a contender on the CPU, in MB; meant for a fresh process."""
    torch.set_num_threads(threads)
    layer, hidden, upstream = make_problem(case)
    # A small call of another layer comes first, so that memory that libraries load and keep is not counted.
    other = make(make_problem(case)[0])
    _call(other.module, other.forward, case.mode, hidden[:, :2], upstream[:, :2])()
    del other
    contender = make(layer)
    return peak_extra_mb(_call(contender.module, contender.forward, case.mode, hidden, upstream))


def _measure(
    case: Case, factories: Mapping[str, Factory], repeats: int, memory: bool, seconds_each: float
) -> LayerResult:
    layer, hidden, upstream = make_problem(case)
    factories = {OURS: our_layer, **factories}
    contenders, left_out = _make_all(factories, layer)
    with torch.no_grad():
        routing = layer.router(hidden)
    errors, wrong = _check(
        contenders, case.mode, exact_step(layer, hidden, routing, upstream), hidden, upstream
    )
    kept = int(routing.kept.sum())
    touched = int(routing.expert_index[routing.kept].unique().numel())

    calls = {
        name: _call(contenders[name].module, contenders[name].forward, case.mode, hidden, upstream)
        for name in errors
    }
    peaks = {
        name: _peak(case, factories[name], contenders[name], calls[name]) if memory else None
        for name in calls
    }
    with case.device:
        dense = dense_layer(case.size).to(case.dtype)
        rows = torch.randn(kept, case.size.d_model).to(case.dtype)
    calls["dense"] = _call(dense, dense, case.mode, rows, torch.ones_like(rows))
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=case.device)
    calls["copy"] = partial(torch.empty_like(source).copy_, source)
    calls["dense"]()
    calls["copy"]()
    timings = time_in_turn(calls, repeats, seconds_each, cuda_ms if case.device.type == "cuda" else wall_ms)

    measured = {name: Measured(timings[name], peaks[name], errors[name]) for name in errors}
    parameters_mb = sum(p.numel() * p.element_size() for p in layer.parameters()) / 1e6
    expert_mb = sum(p[0].numel() * p.element_size() for p in layer.experts.parameters()) / 1e6
    return LayerResult(
        size=case.size,
        mode=case.mode,
        dtype=str(case.dtype).removeprefix("torch."),
        ours=measured.pop(OURS),
        others=measured,
        left_out=left_out | wrong,
        dense=timings["dense"],
        copy_gb_s=2 * _COPY_BYTES / 1e6 / timings["copy"].median_ms,
        weight_mb=touched * expert_mb,
        gradient_mb=parameters_mb if case.mode == "training" else 0.0,
    )


def _make_all(
    factories: Mapping[str, Factory], layer: SparseMLP
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that can be built here, and why the others cannot."""
    contenders, left_out = {}, {}
    for name, make in factories.items():
        try:
            contenders[name] = make(layer)
        except Exception as error:  # whatever another library raises, compare the rest
            if name == OURS:
                raise
            left_out[name] = _one_line(error)
    return contenders, left_out


def _check(
    contenders: Mapping[str, Contender], mode: Mode, exact: list[Tensor], hidden: Tensor, upstream: Tensor
) -> tuple[dict[str, float], dict[str, str]]:
    """Deviations from the float64 loop, and why some contenders have none. Also warms them up."""
    errors, wrong = {}, {}
    for name, contender in contenders.items():
        try:
            if mode == "inference":
                error = forward_error(contender, hidden, exact)
            else:
                error = gradient_error(contender, hidden, upstream, exact)
            if not error <= TOLERANCE[hidden.dtype][mode]:
                raise ArithmeticError(f"{name} deviates from the float64 loop by {error:.1e} in {mode}")
            errors[name] = error
        except Exception as failure:  # whatever another library raises, compare the rest
            if name == OURS:
                raise
            wrong[name] = _one_line(failure)
    return errors, wrong


def _one_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _peak(case: Case, make: Factory, contender: Contender, call: Callable[[], object]) -> float | None:
    if case.device.type == "cuda":
        contender.module.zero_grad(set_to_none=True)  # the previous call left its gradients
        return cuda_peak_extra_mb(call)
    if not can_measure_memory():
        return None
    return in_fresh_process(measure_peak, case, make, torch.get_num_threads())


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
