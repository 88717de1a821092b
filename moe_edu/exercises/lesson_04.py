"""Exercises of lesson 04, dispatch and combine."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_edu.exercises.exercise import Exercise, Mistake

# ---- 04.1


def expert_starts(counts: Tensor) -> Tensor:
    """counts [E], rows of each expert -> [E] int64: the first row of each expert."""
    return counts.cumsum(0) - counts


def _draw_counts(generator: torch.Generator) -> tuple[Tensor]:
    E = int(torch.randint(2, 9, (), generator=generator))
    return (torch.randint(0, 6, (E,), generator=generator),)


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0)


def _starts_and_end(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


_STARTS = Exercise(
    key="04.1",
    title="Where an expert's rows begin",
    task="Rows are sorted by expert, and `counts` says how many each has. Write `expert_starts`: the first row of "
    "each. An expert without rows begins where the next one does.",
    difficulty="easy",
    importance="important",
    minutes=5,
    solution=expert_starts,
    draw=_draw_counts,
    mistakes=(
        Mistake(
            _ends, "Those are the ends: expert 0 should begin at row 0. What comes before an expert's rows?"
        ),
        Mistake(
            _starts_and_end, "One value too many: the last one is where the rows end; no expert begins there."
        ),
    ),
    hints=(
        "An expert begins after the rows of all experts before it.",
        "`counts.cumsum(0)` counts an expert's own rows too. Subtract them again.",
    ),
)

# ---- 04.2


def dispatch(
    hidden: Tensor, expert_index: Tensor, kept: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the R kept choices by expert, and within an expert by token.

    hidden [T, D], expert_index [T, 2] (-1: none), kept [T, 2] bool
    -> rows [R, D], order [R] int64 (the flat choice 2 * t + k of each row), counts [E] int64.
    """
    expert = expert_index.where(kept, num_experts).flatten()
    order = expert.argsort(stable=True)[: kept.sum()]
    counts = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    return hidden[order // 2], order, counts


def _draw_choices(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    T, E, D = (int(torch.randint(low, 9, (), generator=generator)) for low in (3, 2, 2))
    expert_index = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :2]
    alone = torch.rand(T, generator=generator) < 0.2
    expert_index[alone, 1] = -1
    kept = (torch.rand(T, 2, generator=generator) < 0.8) & (expert_index >= 0)
    return torch.randn(T, D, generator=generator), expert_index, kept, E


def _dispatch_all(
    hidden: Tensor, expert_index: Tensor, kept: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    expert = expert_index.where(kept, num_experts).flatten()
    order = expert.argsort(stable=True)
    return hidden[order // 2], order, torch.bincount(expert, minlength=num_experts + 1)[:num_experts]


def _dispatch_count_dropped(
    hidden: Tensor, expert_index: Tensor, kept: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, order, _ = dispatch(hidden, expert_index, kept, num_experts)
    return rows, order, torch.bincount(expert_index[expert_index >= 0], minlength=num_experts)


def _dispatch_by_choice(
    hidden: Tensor, expert_index: Tensor, kept: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    expert = expert_index.where(kept, num_experts).T.flatten()
    order = expert.argsort(stable=True)[: kept.sum()]
    counts = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    return hidden[order % len(hidden)], order, counts


_DISPATCH = Exercise(
    key="04.2",
    title="Dispatch",
    task="Write `dispatch`: collect the rows of all kept choices, sorted by expert. Return the rows, each row's flat "
    "choice $2t+k$, and each expert's number of rows. The model you assemble in lesson 6 will use it.",
    difficulty="medium",
    importance="essential",
    minutes=15,
    solution=dispatch,
    is_piece=True,
    draw=_draw_choices,
    mistakes=(
        Mistake(
            _dispatch_all,
            "Your rows include choices that were not kept. Give those a number after the last expert's, and cut them "
            "off after sorting.",
        ),
        Mistake(
            _dispatch_count_dropped,
            "The rows are right, but `counts` counts dropped choices too. It must add up to the number of rows.",
        ),
        Mistake(
            _dispatch_by_choice,
            "You numbered all first choices before all second ones. Here choice k of token t is `2 * t + k`.",
        ),
    ),
    hints=(
        "Flatten `[T, 2]`, and let choices that were not kept point to an extra expert after the last one.",
        "A stable argsort of the flat experts is the order; its first `kept.sum()` entries are the rows.",
        "Flat choice n belongs to token `n // 2`. `torch.bincount` with `minlength` counts.",
    ),
)

# ---- 04.3


def combine(outputs: Tensor, order: Tensor, gates: Tensor) -> Tensor:
    """outputs [R, D], order [R] (choices 2 * t + k), gates [T, 2] -> [T, D]: what each token receives."""
    weighted = outputs * gates.flatten()[order, None]
    return outputs.new_zeros(len(gates), outputs.shape[1]).index_add(0, order // 2, weighted)


def _draw_outputs(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    hidden, expert_index, kept, num_experts = _draw_choices(generator)
    rows, order, _ = dispatch(hidden, expert_index, kept, num_experts)
    gates = torch.rand(kept.shape, generator=generator) * kept
    return torch.randn(rows.shape, generator=generator), order, gates


def _combine_overwrite(outputs: Tensor, order: Tensor, gates: Tensor) -> Tensor:
    home = outputs.new_zeros(len(gates), outputs.shape[1])
    home[order // 2] += outputs * gates.flatten()[order, None]
    return home


def _combine_unweighted(outputs: Tensor, order: Tensor, gates: Tensor) -> Tensor:
    return outputs.new_zeros(len(gates), outputs.shape[1]).index_add(0, order // 2, outputs)


def _combine_unsorted_gates(outputs: Tensor, order: Tensor, gates: Tensor) -> Tensor:
    weighted = outputs * gates.flatten()[: len(outputs), None]
    return outputs.new_zeros(len(gates), outputs.shape[1]).index_add(0, order // 2, weighted)


_COMBINE = Exercise(
    key="04.3",
    title="Combine",
    task="Write `combine`: add each output, times its gate, to its token; `order` says which token that is. A token "
    "without rows gets zeros. The model you assemble in lesson 6 will use it.",
    difficulty="medium",
    importance="essential",
    minutes=10,
    solution=combine,
    is_piece=True,
    draw=_draw_outputs,
    mistakes=(
        Mistake(
            _combine_overwrite,
            "`home[token] += rows` does not add twice where `token` holds a token twice: the last row wins. Which "
            "function adds all of them?",
        ),
        Mistake(
            _combine_unweighted, "Every output reached its token, but with weight 1. Where are the gates?"
        ),
        Mistake(
            _combine_unsorted_gates,
            "The outputs are sorted by expert and your gates are not: look up each row's gate with `order`.",
        ),
    ),
    hints=(
        "Row r belongs to token `order[r] // 2` and has the gate `gates.flatten()[order[r]]`.",
        "A token may have two rows, and both must be added: `index_add`.",
    ),
)

# ---- 04.4


def pad_rows(rows: Tensor, counts: Tensor, capacity: int) -> Tensor:
    """rows [R, D] sorted by expert, counts [E] -> slots [E, capacity, D], zero where a slot is empty."""
    expert = torch.arange(len(counts)).repeat_interleave(counts)
    slot = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[expert]
    slots = rows.new_zeros(len(counts), capacity, rows.shape[1])
    slots[expert, slot] = rows
    return slots


def _draw_rows(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    E, D = torch.randint(2, 6, (2,), generator=generator).tolist()
    counts = torch.randint(0, 5, (E,), generator=generator)
    spare = int(torch.randint(1, 3, (), generator=generator))
    rows = torch.randn(int(counts.sum()), D, generator=generator)
    return rows, counts, int(counts.max()) + spare


def _pad_end_to_end(rows: Tensor, counts: Tensor, capacity: int) -> Tensor:
    slots = rows.new_zeros(len(counts) * capacity, rows.shape[1])
    slots[: len(rows)] = rows
    return slots.view(len(counts), capacity, rows.shape[1])


def _pad_in_front(rows: Tensor, counts: Tensor, capacity: int) -> Tensor:
    slots = rows.new_zeros(len(counts), capacity, rows.shape[1])
    for e, segment in enumerate(rows.split(counts.tolist())):
        slots[e, capacity - len(segment) :] = segment
    return slots


_PAD = Exercise(
    key="04.4",
    title="Slots of equal size",
    task="A batched product needs blocks of equal size. Write `pad_rows`: put each expert's rows into its first "
    "slots and leave the other slots zero. Try to do it without a loop.",
    difficulty="hard",
    importance="helpful",
    minutes=15,
    solution=pad_rows,
    draw=_draw_rows,
    mistakes=(
        Mistake(
            _pad_end_to_end,
            "You filled the slots without gaps, so rows end up in the slots of an earlier expert. Each expert has "
            "its own block.",
        ),
        Mistake(_pad_in_front, "You left the *first* slots empty. Rows fill a block from slot 0."),
    ),
    hints=(
        "For each row, find its expert and its place among that expert's rows.",
        "`torch.arange(E).repeat_interleave(counts)` is the expert of each row; its place is the row's number minus "
        "the first row of its expert (exercise 04.1).",
    ),
)

# ---- 04.5

_BYTES = Exercise(
    key="04.5",
    title="The price of [E, T, D]",
    task="NLLB-MoE has 128 experts and width 2,048. A batch has 8,192 tokens, and a number takes 2 bytes: how many "
    "MB (10⁶ bytes) does a tensor `[E, T, D]` take?",
    difficulty="easy",
    importance="important",
    minutes=3,
    solution=4294.967296,
    tolerance=2e-3,
    mistakes=(
        Mistake(4294967296, "Those are bytes. One MB is 10⁶ of them."),
        Mistake(4.294967296, "Those are GB (10⁹ bytes). One MB is 10⁶ bytes."),
        Mistake(8589.934592, "You counted 4 bytes per number; half precision takes 2."),
        Mistake(
            67.108864,
            "That is what the sorted rows need, 2 T D. The dense tensor has a copy for each expert.",
        ),
        Mistake(4096, "Those are MiB (2²⁰ bytes). One MB is 10⁶ bytes."),
    ),
    hints=("Multiply the three sizes, then the bytes of one number.", "Divide bytes by 1,000,000."),
)

# ---- 04.6


def kept_choices(gates: Tensor, position: Tensor, capacity: int) -> Tensor:
    """gates [T, 2], position [T, 2] (-1: no choice) -> bool [T, 2]: choices that an expert computes."""
    return (position >= 0) & (position < capacity)


def _published_kept_choices(gates: Tensor, position: Tensor, capacity: int) -> Tensor:
    """gates [T, 2], position [T, 2] (-1: no choice) -> bool [T, 2]: choices that an expert computes."""
    return gates.bool()


def _draw_positions(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    T, capacity = torch.randint(4, 9, (2,), generator=generator).tolist()
    position = torch.randint(0, capacity + 3, (T, 2), generator=generator)
    position[0, 1], position[1, 1] = -1, capacity
    position[2, 1] = torch.randint(capacity, (), generator=generator)
    kept = (position >= 0) & (position < capacity)
    logits = 4 * torch.randn(T, 2, generator=generator)
    logits[2] = torch.tensor([20.0, -20.0])  # a gate this small is 0 in half precision
    gates = logits.masked_fill(~kept, -torch.inf).softmax(dim=1).nan_to_num()
    return gates.half(), position, capacity


def _kept_without_choice(gates: Tensor, position: Tensor, capacity: int) -> Tensor:
    return position < capacity


def _kept_one_too_many(gates: Tensor, position: Tensor, capacity: int) -> Tensor:
    return (position >= 0) & (position <= capacity)


_KEPT = Exercise(
    key="04.6",
    title="Spot the bug: who was kept?",
    task="The published layer takes a gate of 0 as a sign that a choice was dropped. In half precision a small gate "
    "*is* 0. Then the kept choice is not computed, and its place is wasted. Fix it.",
    difficulty="easy",
    importance="important",
    minutes=5,
    solution=kept_choices,
    starter=_published_kept_choices,
    origin="transformers 4.57.6, `models/nllb_moe/modeling_nllb_moe.py` (`router_probs.bool()`)",
    draw=_draw_positions,
    mistakes=(
        Mistake(
            _kept_without_choice,
            "Position -1 stands for a choice that was never made, and it is below any capacity.",
        ),
        Mistake(_kept_one_too_many, "Places count from 0, so place `capacity` is one too many."),
    ),
    hints=(
        "Whether a choice found room depends on its place in the queue, not on its gate.",
        "Two comparisons joined by `&`: one excludes choices never made, the other those that came too late.",
    ),
)

EXERCISES = (_STARTS, _DISPATCH, _COMBINE, _PAD, _BYTES, _KEPT)
