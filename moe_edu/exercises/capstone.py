"""The capstone: the functions that a learner wrote in lessons 02 to 05, at work inside the real model.

`Pieces` holds the learner's functions, and ours where one is missing. `assemble(model, pieces)` returns a model with
the same weights whose sparse layers run them; `train(..., pieces=pieces)` trains with them.

    pieces = Pieces(top2_choices=top2_choices, router_z=router_z)
    print(pieces.report())
    mine = assemble(load_pretrained().model, pieces)

Shapes: T tokens, E experts, K = 2 choices per token, D model width, R kept choices.
Pieces need not handle padding: padding chooses no expert and takes no slot, so pieces that count see real tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_edu.config import MoEConfig
from moe_edu.moe.experts import Experts
from moe_edu.moe.layer import Mask, Model, SparseMLP, with_parts
from moe_edu.moe.metrics import ExpertMetrics
from moe_edu.moe.router_losses import load_balancing_loss, router_z_loss
from moe_edu.moe.routing import RouterOutput, count_per_expert, queue_positions, top2_gating

Piece = Callable[..., Any]

TRIALS = 20
TOLERANCE = 1e-4


class PieceError(ValueError):
    """A learner's piece fails or computes something other than ours; the message says which piece and how."""


@dataclass(frozen=True)
class Pieces:
    """The parts of a sparse layer and of its losses; None stands for ours.

    Attributes:
        top2_choices: lesson 02; `logits [T, E]` to `probs [T, E]` and `expert_index [T, 2]`.
        queue_positions: lesson 03; `expert_index [T, 2]`, `num_experts` to `position [T, 2]`: all first choices queue
            before any second choice.
        keep_and_weigh: lesson 03; `probs`, `expert_index`, `position`, `capacity` to `kept [T, 2]` bool and
            `gates [T, 2]`, normalised over the kept choices.
        dispatch: lesson 04; `hidden [T, D]`, `expert_index`, `kept`, `num_experts` to `rows [R, D]` sorted by expert,
            `order [R]` (the flat choice `2 * t + k` of each row) and `counts [E]`.
        combine: lesson 04; `outputs [R, D]`, `order`, `gates` to `[T, D]`.
        balancing_loss: lesson 05; `probs`, `expert_index` to a scalar.
        router_z: lesson 05; `logits` to a scalar.
    """

    top2_choices: Piece | None = None
    queue_positions: Piece | None = None
    keep_and_weigh: Piece | None = None
    dispatch: Piece | None = None
    combine: Piece | None = None
    balancing_loss: Piece | None = None
    router_z: Piece | None = None

    def __post_init__(self) -> None:
        for name, piece in self.given().items():
            if not callable(piece):
                raise PieceError(f"{name} must be your function itself, not a {type(piece).__name__}")

    def given(self) -> dict[str, Piece]:
        """The learner's functions by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: piece for name, piece in named.items() if piece is not None}

    def get(self, name: str) -> Piece:
        """The learner's function, or ours."""
        return self.given().get(name, OURS[name])

    def report(self) -> str:
        """Whose function each part is, one part per line."""
        given = self.given()
        lines = [f"{'✓ yours' if name in given else '  ours '}  {name}" for name in OURS]
        return "\n".join([*lines, f"{len(given)} of {len(OURS)} parts are yours."])

    def assemble(self, model: Model) -> Model:
        """Like the function `assemble`, with these pieces."""
        return assemble(model, self)

    def collect_metrics(self, routing: Iterable[RouterOutput | None]) -> tuple[ExpertMetrics, ...]:
        """Like `moe_edu.collect_metrics`, with these pieces for the two losses."""
        return tuple(self._measure(layer) for layer in routing if layer is not None)

    def _measure(self, layer: RouterOutput) -> ExpertMetrics:
        real = real_tokens(layer.num_tokens, layer.padding, layer.logits.device)
        return ExpertMetrics.from_routing(layer)._replace(
            auxiliary_loss=self.get("balancing_loss")(layer.probs[real], layer.expert_index[real]),
            router_z_loss=self.get("router_z")(layer.logits[real]),
        )


def assemble(model: Model, pieces: Pieces) -> Model:
    """A copy of `model`, its weights included, whose sparse layers run `pieces`.

    Raises:
        PieceError: on random inputs, a piece computes something other than ours (see `check_pieces`).
        ValueError: the pieces do not cover the model's configuration.
    """
    check_pieces(pieces)
    for module in model.modules():
        if isinstance(module, SparseMLP):
            check_covered(module.config)
    return with_parts(model, partial(gate, pieces), partial(mix, pieces))


def gate(
    pieces: Pieces, logits: Tensor, *, capacity: int, padding: Tensor | None, **covered: Any
) -> RouterOutput:
    """`top2_gating` with `pieces`; `covered` takes the options whose values `check_covered` has checked."""
    T, E = logits.shape
    probs, expert_index = pieces.get("top2_choices")(logits)
    real = real_tokens(T, padding, logits.device)
    chosen = expert_index[real]
    position = pieces.get("queue_positions")(chosen, E)
    kept, gates = pieces.get("keep_and_weigh")(probs[real], chosen, position, capacity)
    return RouterOutput(
        logits=logits,
        probs=probs,
        expert_index=spread(chosen, real, T, -1),
        combine_weights=spread(gates, real, T, 0.0),
        position=spread(position, real, T, -1),
        kept=spread(kept, real, T, False),
        capacity=capacity,
        padding=padding,
    )


def mix(pieces: Pieces, hidden: Tensor, routing: RouterOutput, experts: Experts, mask: Mask) -> Tensor:
    """`dispatch_and_combine` with `pieces`."""
    real = real_tokens(len(hidden), routing.padding, hidden.device)
    rows, order, counts = pieces.get("dispatch")(
        hidden[real], routing.expert_index[real], routing.kept[real], routing.num_experts
    )
    outputs, gates = mask(experts(rows, counts, routing.capacity), routing.combine_weights)
    mixed = pieces.get("combine")(outputs, order, gates[real].to(outputs.dtype))
    return spread(mixed, real, len(hidden), 0.0)


def check_covered(config: MoEConfig) -> None:
    """Refuse a configuration whose routing the pieces do not cover.

    Raises:
        ValueError: the pieces do not cover a field; the message names it and the value that it must have.
    """
    covered = {
        "second_expert_policy": "all",
        "normalize_router_prob_before_dropping": False,
        "batch_prioritized_routing": False,
    }
    for name, value in covered.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"the pieces cover {name}={value!r} only; this model has {getattr(config, name)!r}"
            )
    if config.num_experts < 2:
        raise ValueError("the pieces choose two experts per token; this model has only one")


def real_tokens(num_tokens: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """The indices of the tokens that are not padding, int64."""
    if padding is None:
        return torch.arange(num_tokens, device=device)
    return (~padding).nonzero().squeeze(1)


def spread(values: Tensor, real: Tensor, num_tokens: int, fill: float) -> Tensor:
    """Put `values [len(real), ...]` at the indices `real` among `num_tokens`, and `fill` elsewhere."""
    return values.new_full((num_tokens, *values.shape[1:]), fill).index_copy(0, real, values)


# ---- our own pieces, in the same form


def _top2_choices(logits: Tensor) -> tuple[Tensor, Tensor]:
    routing = top2_gating(logits, capacity=len(logits))
    return routing.probs, routing.expert_index


def _keep_and_weigh(
    probs: Tensor, expert_index: Tensor, position: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    kept = (expert_index >= 0) & (position < capacity)
    weights = probs.gather(1, expert_index.clamp(min=0)) * kept
    total = weights.sum(dim=1, keepdim=True)
    # Not clamped to a tiny number: where nothing is kept, its gradient would be infinity times zero.
    return kept, weights / total.where(total > 0, 1.0)


def _dispatch(
    hidden: Tensor, expert_index: Tensor, kept: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    expert = expert_index.where(kept, num_experts).flatten()
    order = expert.argsort(stable=True)[: int(kept.sum())]
    return hidden[order // 2], order, count_per_expert(expert_index.where(kept, -1), num_experts)


def _combine(outputs: Tensor, order: Tensor, gates: Tensor) -> Tensor:
    weighted = outputs * gates.flatten()[order, None]
    return outputs.new_zeros(len(gates), outputs.shape[1]).index_add(0, order // 2, weighted)


OURS: Mapping[str, Piece] = {
    "top2_choices": _top2_choices,
    "queue_positions": queue_positions,
    "keep_and_weigh": _keep_and_weigh,
    "dispatch": _dispatch,
    "combine": _combine,
    "balancing_loss": load_balancing_loss,
    "router_z": router_z_loss,
}


# ---- is a piece right?


def check_pieces(pieces: Pieces, seed: int = 0) -> None:
    """Compare each of the learner's pieces with ours on random inputs: results, gradients, and inputs left unchanged.

    Raises:
        PieceError: a piece differs; the message names the first that does, and how.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(TRIALS):
        for name, arguments in _draw_arguments(generator):
            if name in pieces.given():
                _check_piece(name, pieces.get(name), arguments)


def _draw_arguments(generator: torch.Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every piece's arguments for one random batch of tokens; experts may be empty, and choices may be dropped."""
    T, E, capacity = (int(torch.randint(low, 9, (), generator=generator)) for low in (1, 2, 0))
    logits = 2 * torch.randn(T, E, generator=generator)
    hidden = torch.randn(T, 3, generator=generator)
    probs, expert_index = _top2_choices(logits)
    position = queue_positions(expert_index, E)
    kept, gates = _keep_and_weigh(probs, expert_index, position, capacity)
    rows, order, _ = _dispatch(hidden, expert_index, kept, E)
    yield "top2_choices", (logits,)
    yield "queue_positions", (expert_index, E)
    yield "keep_and_weigh", (probs, expert_index, position, capacity)
    yield "dispatch", (hidden, expert_index, kept, E)
    yield "combine", (rows, order, gates)
    yield "balancing_loss", (probs, expert_index)
    yield "router_z", (logits,)


def _check_piece(name: str, piece: Piece, arguments: tuple[Any, ...]) -> None:
    given, expected_given = _leaves(arguments), _leaves(arguments)
    try:
        results = _as_tuple(piece(*given))
    except Exception as error:
        raise PieceError(f"{name} stops with {type(error).__name__}: {error}") from error
    expected = _as_tuple(OURS[name](*expected_given))
    if len(results) != len(expected):
        raise PieceError(f"{name} should return {len(expected)} values, not {len(results)}")
    if name == "dispatch":
        results = _by_expert_and_token(results, arguments)
    for number, (result, ours) in enumerate(zip(results, expected, strict=True), start=1):
        which = f"{name}, value {number}" if len(expected) > 1 else name
        _check_result(which, result, ours)
    _check_gradients(name, (given, results), (expected_given, expected))
    changed = [not torch.equal(a, b) for a, b in zip(given, arguments, strict=True) if isinstance(b, Tensor)]
    if any(changed):
        raise PieceError(f"{name} changes its inputs: work on a copy")


def _check_result(which: str, result: Any, ours: Tensor) -> None:
    if not isinstance(result, Tensor):
        raise PieceError(f"{which} should be a tensor, not a {type(result).__name__}")
    if result.shape != ours.shape:
        raise PieceError(f"{which} has the shape {list(result.shape)} instead of {list(ours.shape)}")
    if result.dtype != ours.dtype:
        raise PieceError(f"{which} is {result.dtype} instead of {ours.dtype}")
    right = torch.isclose(result, ours, rtol=TOLERANCE, atol=TOLERANCE)
    if not right.all():
        if ours.ndim == 0:
            raise PieceError(f"{which} gives {result.item():.4g} where ours gives {ours.item():.4g}")
        share = right.float().mean().item()
        raise PieceError(f"{which} has the right shape, but only {share:.0%} of its values agree with ours")


def _check_gradients(
    name: str, answer: tuple[tuple[Any, ...], tuple[Any, ...]], ours: tuple[tuple[Any, ...], tuple[Any, ...]]
) -> None:
    for number, (grad, expected) in enumerate(
        zip(_gradients(*answer), _gradients(*ours), strict=True), start=1
    ):
        if not grad.isfinite().all():
            raise PieceError(
                f"{name} has the right values, but a gradient of its input {number} is NaN or infinite: "
                "do you divide by zero, or almost, where no choice is kept?"
            )
        if not torch.allclose(grad, expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise PieceError(
                f"{name} has the right values, but the gradient of its input {number} differs from ours: "
                "is something detached, or taken out of the graph with .item() or .tolist()?"
            )


def _gradients(inputs: tuple[Any, ...], results: tuple[Any, ...]) -> list[Tensor]:
    """The gradient of a fixed mix of the results for each floating-point input; zeros where none flows."""
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    flowing = [result for result in results if result.requires_grad]
    if not flowing:
        return [torch.zeros_like(leaf) for leaf in leaves]
    # The weights of the mix are uneven, since the plain sum of a softmax would have no gradient at all.
    mix = sum((result * torch.arange(1.0, result.numel() + 1).view(result.shape)).sum() for result in flowing)
    assert isinstance(mix, Tensor)
    grads = torch.autograd.grad(mix, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def _by_expert_and_token(results: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rows in our order, if the learner's are sorted by expert, but within each expert by choice or in reverse."""
    rows, order, counts = results
    _, expert_index, kept, num_experts = arguments
    flat = expert_index.where(kept, num_experts).flatten()
    is_index = isinstance(order, Tensor) and order.dtype == torch.int64 and order.ndim == 1
    if not is_index or len(order) != len(rows) or not ((order >= 0) & (order < flat.numel())).all():
        return results
    if (flat[order].diff() < 0).any():
        raise PieceError("dispatch, value 1: its rows are not sorted by expert")
    arrange = order.argsort()
    arrange = arrange[flat[order[arrange]].argsort(stable=True)]
    return rows[arrange], order[arrange], counts


def _leaves(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the arguments, with gradients for floating-point tensors."""
    return tuple(
        value.detach().clone().requires_grad_(value.is_floating_point())
        if isinstance(value, Tensor)
        else value
        for value in arguments
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
