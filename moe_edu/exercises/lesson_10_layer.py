"""Bugs in published sparse layers: which experts run, on what, and what happens to their outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.exercises.exercise import Exercise, Mistake
from moe_edu.exercises.lesson_10_router import NLLB, randint

SWITCH = "`modeling_switch_transformers.py`"


# ---- 10.7


def add_branch(
    hidden: Tensor, branch: Tensor, noise: Tensor, dropout: float, activation_dropout: float
) -> Tensor:
    """hidden, branch, noise (uniform, 0 to 1) [T, D] -> [T, D]: hidden plus the branch, dropped out."""
    keep = noise >= dropout
    return hidden + branch * keep / (1 - dropout)


def _published_add_branch(
    hidden: Tensor, branch: Tensor, noise: Tensor, dropout: float, activation_dropout: float
) -> Tensor:
    """hidden, branch, noise (uniform, 0 to 1) [T, D] -> [T, D]: hidden plus the branch, dropped out."""
    keep = noise >= activation_dropout
    return hidden + branch * keep / (1 - activation_dropout)


def _draw_branch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, float, float]:
    T, D = randint(generator, 3, 7), randint(generator, 3, 7)
    hidden, branch = torch.randn(2, T, D, generator=generator)
    noise = torch.rand(T, D, generator=generator)
    dropout, activation_dropout = (randint(generator, 4, 8) / 10, randint(generator, 0, 4) / 10)
    return hidden, branch, noise, dropout, activation_dropout


def _branch_with_two_rates(
    hidden: Tensor, branch: Tensor, noise: Tensor, dropout: float, activation_dropout: float
) -> Tensor:
    return hidden + branch * (noise >= dropout) / (1 - activation_dropout)


def _branch_with_dropped_residual(
    hidden: Tensor, branch: Tensor, noise: Tensor, dropout: float, activation_dropout: float
) -> Tensor:
    return (hidden + branch) * (noise >= dropout) / (1 - dropout)


_ADD_BRANCH = Exercise(
    key="10.7",
    title="The wrong dropout",
    task="`activation_dropout` belongs inside the feed-forward network, `dropout` after it. Fix the residual branch. "
    "**The test:** each rate in the configuration changes only its own place.",
    difficulty="easy",
    importance="helpful",
    minutes=3,
    solution=add_branch,
    starter=_published_add_branch,
    origin=f"transformers 4.57.6, {NLLB}",
    draw=_draw_branch,
    mistakes=(
        Mistake(
            _branch_with_two_rates, "The rescaling must use the rate of the dropout that it compensates for."
        ),
        Mistake(
            _branch_with_dropped_residual,
            "You dropped parts of the residual stream itself, not of the branch.",
        ),
    ),
    hints=("Two names, two rates. Which belongs here?", "The rate appears in two places."),
)


# ---- 10.8


def mask_outputs(outputs: Tensor, noise: Tensor, p: float, training: bool) -> Tensor:
    """outputs, noise (uniform, 0 to 1) [R, D], a row for each word at each of its experts -> [R, D]."""
    if training:
        keep = noise[:, :1] >= p
        return outputs * keep
    return outputs * (1 - p)


def _published_mask_outputs(outputs: Tensor, noise: Tensor, p: float, training: bool) -> Tensor:
    """outputs, noise (uniform, 0 to 1) [R, D], a row for each word at each of its experts -> [R, D]."""
    if training:
        keep = noise >= p
        return outputs * keep / (1 - p)
    return outputs * (1 - p)


def _draw_outputs(generator: torch.Generator) -> tuple[Tensor, Tensor, float, bool]:
    R, D = randint(generator, 6, 12), randint(generator, 3, 6)
    outputs, noise = torch.randn(R, D, generator=generator), torch.rand(R, D, generator=generator)
    return outputs, noise, randint(generator, 3, 7) / 10, randint(generator, 0, 3) > 0


def _mask_rows_rescaled(outputs: Tensor, noise: Tensor, p: float, training: bool) -> Tensor:
    return outputs * (noise[:, :1] >= p) / (1 - p) if training else outputs * (1 - p)


def _mask_elements(outputs: Tensor, noise: Tensor, p: float, training: bool) -> Tensor:
    return outputs * (noise >= p) if training else outputs * (1 - p)


def _mask_rows_of_training(outputs: Tensor, noise: Tensor, p: float, training: bool) -> Tensor:
    return outputs * (noise[:, :1] >= p) if training else outputs


_MASK_OUTPUTS = Exercise(
    key="10.8",
    title="Masked twice over",
    task="Expert output masking zeroes whole rows (use the first column of `noise`) and rescales in one mode only: "
    "evaluation. Fix it. **The test:** the mean output in training equals that in evaluation.",
    difficulty="medium",
    importance="important",
    minutes=5,
    solution=mask_outputs,
    starter=_published_mask_outputs,
    origin=f"transformers 4.57.6, {NLLB}",
    draw=_draw_outputs,
    mistakes=(
        Mistake(
            _mask_rows_rescaled,
            "Masking whole rows is right, but you still rescale in both modes, so outputs are larger in training "
            "than in evaluation.",
        ),
        Mistake(
            _mask_elements,
            "The scale is right, but single elements are masked: no expert's output is ever all zeros.",
        ),
        Mistake(
            _mask_rows_of_training,
            "Now outputs are larger in evaluation than in training: multiply them by 1 - p.",
        ),
    ),
    hints=(
        "`nn.Dropout` masks single elements, and it divides by 1 - p. Neither belongs here.",
        "`noise[:, :1]` has one number per row and broadcasts along it.",
    ),
)


# ---- 10.9


def switch_layer(hidden: Tensor, jitter: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    """hidden, jitter [T, D], router [E, D], experts [E, D, D] -> [T, D]: best expert times gate."""
    noisy = hidden * jitter
    gate, expert = (noisy @ router.T).softmax(dim=1).max(dim=1)
    output = torch.einsum("td,tdf->tf", hidden, experts[expert])
    return gate[:, None] * output


def _published_switch_layer(hidden: Tensor, jitter: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    """hidden, jitter [T, D], router [E, D], experts [E, D, D] -> [T, D]: best expert times gate."""
    hidden *= jitter
    gate, expert = (hidden @ router.T).softmax(dim=1).max(dim=1)
    output = torch.einsum("td,tdf->tf", hidden, experts[expert])
    return gate[:, None] * output


def _draw_switch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, D, E = (randint(generator, 3, 7) for _ in range(3))
    hidden, router = torch.randn(T, D, generator=generator), torch.randn(E, D, generator=generator)
    return (
        hidden,
        0.5 + torch.rand(T, D, generator=generator),
        router,
        torch.randn(E, D, D, generator=generator),
    )


def _switch_without_jitter(hidden: Tensor, jitter: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    return switch_layer(hidden, torch.ones_like(jitter), router, experts)


def _switch_with_jittered_experts(hidden: Tensor, jitter: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    gate, expert = (hidden @ router.T).softmax(dim=1).max(dim=1)
    return gate[:, None] * torch.einsum("td,tdf->tf", hidden * jitter, experts[expert])


_SWITCH_LAYER = Exercise(
    key="10.9",
    title="Noise for the router only",
    task="Jitter, random factors near 1, should make the router explore. Here the experts see it too. Fix it. **The "
    "test:** with a single expert, jitter changes nothing.",
    difficulty="medium",
    importance="important",
    minutes=4,
    solution=switch_layer,
    starter=_published_switch_layer,
    origin=f"transformers 4.57.6, {SWITCH}",
    draw=_draw_switch,
    mistakes=(
        Mistake(
            _switch_without_jitter, "Without jitter the router does not explore. Keep it, for the router."
        ),
        Mistake(
            _switch_with_jittered_experts,
            "You have it the wrong way round: the experts get jitter, and the router none.",
        ),
    ),
    hints=("How many tensors are called `hidden` here?", "Give the jittered copy its own name."),
)


# ---- 10.10


def find_room(probs: Tensor, capacity: int) -> Tensor:
    """probs [T, E] -> [T] bool: whether a word finds room at its best expert, in order."""
    chosen = F.one_hot(probs.argmax(dim=1), probs.shape[1])
    place = chosen.cumsum(dim=0)
    return (chosen * (place <= capacity)).sum(dim=1).bool()


def _published_find_room(probs: Tensor, capacity: int) -> Tensor:
    """probs [T, E] -> [T] bool: whether a word finds room at its best expert, in order."""
    _, expert = probs.max(dim=1, keepdim=True)
    chosen = F.one_hot(expert, probs.shape[1])
    place = chosen.cumsum(dim=-2)
    return (chosen * (place <= capacity)).sum(dim=(1, 2)).bool()


def _draw_crowd(generator: torch.Generator) -> tuple[Tensor, int]:
    T, E = randint(generator, 7, 12), randint(generator, 2, 4)
    return torch.randn(T, E, generator=generator).softmax(dim=1), randint(generator, 1, 3)


def _one_place_too_few(probs: Tensor, capacity: int) -> Tensor:
    return find_room(probs, capacity - 1)


def _last_come_first(probs: Tensor, capacity: int) -> Tensor:
    return find_room(probs.flip(0), capacity).flip(0)


_FIND_ROOM = Exercise(
    key="10.10",
    title="A capacity that never drops",
    task="Every word finds room, however small the capacity. Fix it. **The test that catches it:** no expert keeps "
    "more words than its capacity. Print the shapes first.",
    difficulty="medium",
    importance="essential",
    minutes=5,
    solution=find_room,
    starter=_published_find_room,
    origin=f"transformers 5.0.0, {SWITCH}",
    draw=_draw_crowd,
    mistakes=(
        Mistake(_one_place_too_few, "One word too few: the first in a queue has place 1 here, not 0."),
        Mistake(_last_come_first, "The queue runs backwards: the last words get the places."),
    ),
    hints=(
        "`chosen` has three dimensions. Along which of them does `cumsum` run, and how long is it?",
        "Without `keepdim=True` the words are dimension 0: run along that one.",
    ),
)


# ---- 10.11


def experts_to_run(router_mask: Tensor) -> Tensor:
    """router_mask [B, S, E], 1 where a word goes to an expert -> [E] bool: which experts are needed."""
    B, S, E = router_mask.shape
    flat = router_mask.reshape(B * S, E)
    return flat.sum(dim=0) > 0


def _published_experts_to_run(router_mask: Tensor) -> Tensor:
    """router_mask [B, S, E], 1 where a word goes to an expert -> [E] bool: which experts are needed."""
    B, S, E = router_mask.shape
    flat = router_mask.transpose(1, 2).reshape(B * S, E)
    return flat.sum(dim=0) > 0


def _draw_router_mask(generator: torch.Generator) -> tuple[Tensor]:
    B, S, E = randint(generator, 2, 4), randint(generator, 2, 4), randint(generator, 5, 8)
    wanted = torch.randperm(E, generator=generator)[:2]
    return (F.one_hot(wanted[torch.randint(2, (B, S), generator=generator)], E),)


def _all_experts(router_mask: Tensor) -> Tensor:
    return torch.ones(router_mask.shape[-1], dtype=torch.bool)


def _experts_of_each_sentence(router_mask: Tensor) -> Tensor:
    return router_mask.sum(dim=1) > 0


_EXPERTS_TO_RUN = Exercise(
    key="10.11",
    title="Experts that stay at home",
    task="Some experts that were chosen do not run, and others run for nothing. Fix it. **The test:** the experts "
    "that run are those that were chosen.",
    difficulty="medium",
    importance="essential",
    minutes=4,
    solution=experts_to_run,
    starter=_published_experts_to_run,
    origin=f"transformers 4.44.2, {SWITCH}",
    draw=_draw_router_mask,
    mistakes=(
        Mistake(_all_experts, "The outputs are right, but every expert runs: the layer is no longer sparse."),
        Mistake(
            _experts_of_each_sentence,
            "That is a list for each sentence. Return one list for the whole batch.",
        ),
    ),
    hints=(
        "`reshape` keeps the order in memory. After `transpose`, is the last dimension still the experts?",
        "One of the two calls is not needed at all.",
    ),
)


# ---- 10.12


def sparse_layer(hidden: Tensor, experts: Tensor, top_1_mask: Tensor, gates: Tensor) -> Tensor:
    """hidden [T, D], experts [E, D, D], top_1_mask [T, E], gates [T, E] (two per row) -> [T, D]."""
    output = torch.zeros_like(hidden)
    for e in range(len(experts)):
        t = gates[:, e].nonzero().squeeze(1)
        output.index_add_(0, t, gates[t, e, None] * (hidden[t] @ experts[e]))
    return output


def _published_sparse_layer(hidden: Tensor, experts: Tensor, top_1_mask: Tensor, gates: Tensor) -> Tensor:
    """hidden [T, D], experts [E, D, D], top_1_mask [T, E], gates [T, E] (two per row) -> [T, D]."""
    output = torch.zeros_like(hidden)
    chosen = F.one_hot(top_1_mask, len(experts)).permute(2, 1, 0)
    for e in range(len(experts)):
        slot, t = torch.where(chosen[e])
        output.index_add_(0, t, gates[t, slot, None] * (hidden[t] @ experts[e]))
    return output


def _draw_sparse_layer(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, D, E = randint(generator, 5, 10), randint(generator, 2, 5), randint(generator, 4, 9)
    probs, chosen = torch.randn(T, E, generator=generator).softmax(dim=1).topk(2, dim=1)
    gates = torch.zeros(T, E).scatter(1, chosen, probs / probs.sum(dim=1, keepdim=True))
    hidden, experts = torch.randn(T, D, generator=generator), torch.randn(E, D, D, generator=generator)
    return hidden, experts, F.one_hot(chosen[:, 0], E), gates


def _first_choices_only(hidden: Tensor, experts: Tensor, top_1_mask: Tensor, gates: Tensor) -> Tensor:
    return sparse_layer(hidden, experts, top_1_mask, gates * top_1_mask)


def _without_gates(hidden: Tensor, experts: Tensor, top_1_mask: Tensor, gates: Tensor) -> Tensor:
    return sparse_layer(hidden, experts, top_1_mask, (gates > 0).to(hidden.dtype))


_SPARSE_LAYER = Exercise(
    key="10.12",
    title="Two experts of 128",
    task="The router is right, every shape is right, but only experts 0 and 1 run. Fix the layer so that both "
    "choices of a word run. **The test:** it equals a loop over words.",
    difficulty="hard",
    importance="essential",
    minutes=8,
    solution=sparse_layer,
    starter=_published_sparse_layer,
    origin=f"transformers 5.0.0 and 5.23.0, {NLLB}",
    draw=_draw_sparse_layer,
    mistakes=(
        Mistake(
            _first_choices_only,
            "All experts run now, but only for first choices. Which run for the second choices?",
        ),
        Mistake(_without_gates, "The right experts run, but their outputs are added without their gates."),
    ),
    hints=(
        "`F.one_hot` expects indices. Which values does a one-hot mask hold, and which experts have those numbers?",
        "Which words go to expert e? The gates say so: those whose gate for e is not 0.",
        "For each e: `t = gates[:, e].nonzero().squeeze(1)`, then add `gates[t, e, None]` times the expert's output.",
    ),
)


EXERCISES = (_ADD_BRANCH, _MASK_OUTPUTS, _SWITCH_LAYER, _FIND_ROOM, _EXPERTS_TO_RUN, _SPARSE_LAYER)
