"""Exercises of lesson 03, capacity."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.exercises.exercise import Exercise, Mistake


def training_capacity(num_tokens: int, num_experts: int, factor: float) -> int:
    """Slots in each expert: the even share, rounded up, times 2 and the factor, rounded up again."""
    return math.ceil(factor * 2 * math.ceil(num_tokens / num_experts))


def _draw_sizes(generator: torch.Generator) -> tuple[int, int, float]:
    T = int(torch.randint(20, 500, (), generator=generator))
    E = int(torch.randint(3, 33, (), generator=generator))
    return T, E, (0.5, 0.75, 1.25, 1.5)[int(torch.randint(4, (), generator=generator))]


def _capacity_of_one_choice(num_tokens: int, num_experts: int, factor: float) -> int:
    return math.ceil(factor * math.ceil(num_tokens / num_experts))


def _capacity_rounded_down(num_tokens: int, num_experts: int, factor: float) -> int:
    return int(factor * 2 * (num_tokens // num_experts))


def _capacity_rounded_once(num_tokens: int, num_experts: int, factor: float) -> int:
    return math.ceil(factor * 2 * num_tokens / num_experts)


_CAPACITY = Exercise(
    key="03.1",
    title="How many slots?",
    task="Write `training_capacity`, the number of slots per expert in training: an even share of the tokens, "
    "rounded up, times the two choices and the capacity factor; then round up once more.",
    difficulty="easy",
    importance="essential",
    minutes=4,
    solution=training_capacity,
    draw=_draw_sizes,
    cases=40,
    mistakes=(
        Mistake(_capacity_of_one_choice, "You counted the tokens, but each token makes two choices."),
        Mistake(
            _capacity_rounded_down,
            "You rounded down: then even a perfectly balanced batch finds too few slots.",
        ),
        Mistake(
            _capacity_rounded_once,
            "You rounded only at the end. The published formula rounds the even share up first, then the product.",
        ),
    ),
    hints=(
        "The even share is `math.ceil(num_tokens / num_experts)`.",
        "Choices and factor multiply the rounded share, and `math.ceil` rounds once more.",
    ),
)


def smallest_capacity(expert_index: Tensor, num_experts: int) -> int:
    """expert_index [T, 2] -> the smallest capacity at which every choice finds room."""
    return int(torch.bincount(expert_index.flatten(), minlength=num_experts).max())


def _draw_choices(generator: torch.Generator) -> tuple[Tensor, int]:
    """T from 8 to 24 tokens with two different choices among E from 3 to 6 experts, some more popular."""
    T = int(torch.randint(8, 25, (), generator=generator))
    E = int(torch.randint(3, 7, (), generator=generator))
    logits = torch.randn(T, E, generator=generator) + torch.linspace(2, 0, E)
    return logits.topk(2, dim=1).indices, E


def _capacity_for_first_choices(expert_index: Tensor, num_experts: int) -> int:
    return int(torch.bincount(expert_index[:, 0], minlength=num_experts).max())


def _capacity_of_even_load(expert_index: Tensor, num_experts: int) -> int:
    return math.ceil(expert_index.numel() / num_experts)


def _capacity_as_last_position(expert_index: Tensor, num_experts: int) -> int:
    return int(torch.bincount(expert_index.flatten(), minlength=num_experts).max()) - 1


_SMALLEST = Exercise(
    key="03.2",
    title="Room for everybody",
    task="Write `smallest_capacity`: the smallest number of slots per expert, the same for all experts, at which "
    "this batch drops no choice.",
    difficulty="easy",
    importance="important",
    minutes=4,
    solution=smallest_capacity,
    draw=_draw_choices,
    mistakes=(
        Mistake(
            _capacity_for_first_choices, "You counted first choices only. Second choices need a slot as well."
        ),
        Mistake(
            _capacity_of_even_load,
            "That would do if the experts were equally popular. The most popular one sets the capacity.",
        ),
        Mistake(
            _capacity_as_last_position,
            "One too few: that is the last position in the longest queue, and positions start at 0.",
        ),
    ),
    hints=(
        "All experts have the same number of slots, so the longest queue decides.",
        "`torch.bincount` counts how often each expert occurs in `expert_index.flatten()`.",
    ),
)


def queue_positions(expert_index: Tensor, num_experts: int) -> Tensor:
    """expert_index [T, 2] -> position [T, 2] int64, from 0; -1 in both where there is no choice."""
    one_hot = F.one_hot(expert_index + 1, num_experts + 1)[..., 1:]  # no choice is a row of zeros
    first, second = one_hot.unbind(dim=1)
    before_first = first.cumsum(0) - first
    before_second = first.sum(0) + second.cumsum(0) - second
    position = torch.stack([(before_first * first).sum(1), (before_second * second).sum(1)], dim=1)
    return position.where(expert_index >= 0, -1)


def _draw_choices_with_gaps(generator: torch.Generator) -> tuple[Tensor, int]:
    """Some tokens make no second choice, some none at all."""
    expert_index, E = _draw_choices(generator)
    missing = torch.rand(expert_index.shape, generator=generator) < 0.3
    missing[:, 1] |= missing[:, 0]
    missing[0] = False
    missing[1, 1] = True
    return expert_index.masked_fill(missing, -1), E


def _positions_from_one(expert_index: Tensor, num_experts: int) -> Tensor:
    position = queue_positions(expert_index, num_experts)
    return position.where(position < 0, position + 1)


def _positions_token_by_token(expert_index: Tensor, num_experts: int) -> Tensor:
    line = F.one_hot(expert_index.flatten() + 1, num_experts + 1)[:, 1:]
    position = ((line.cumsum(0) - line) * line).sum(1).reshape(expert_index.shape)
    return position.where(expert_index >= 0, -1)


def _positions_in_two_queues(expert_index: Tensor, num_experts: int) -> Tensor:
    one_hot = F.one_hot(expert_index + 1, num_experts + 1)[..., 1:]
    position = ((one_hot.cumsum(0) - one_hot) * one_hot).sum(2)
    return position.where(expert_index >= 0, -1)


def _positions_of_nobody(expert_index: Tensor, num_experts: int) -> Tensor:
    position = queue_positions(expert_index, num_experts)
    return position.clamp(min=0)


_POSITIONS = Exercise(
    key="03.3",
    title="Stand in line",
    task="Write `queue_positions`: each choice's place in its expert's queue, from 0. All first choices come before "
    "any second choice; within each group, tokens keep their order. A missing choice (-1) has position -1.",
    difficulty="hard",
    importance="essential",
    minutes=15,
    solution=queue_positions,
    is_piece=True,
    draw=_draw_choices_with_gaps,
    mistakes=(
        Mistake(
            _positions_from_one,
            "Your positions start at 1. A cumulative sum counts the token itself: subtract it.",
        ),
        Mistake(
            _positions_token_by_token,
            "You let each token queue with both choices before the next token. All first choices come before any "
            "second.",
        ),
        Mistake(
            _positions_in_two_queues,
            "Your second choices start at 0 again. They come after all the first choices of their expert.",
        ),
        Mistake(
            _positions_of_nobody,
            "A missing choice should have position -1; yours has 0, the first place in the queue.",
        ),
    ),
    hints=(
        "`F.one_hot(expert_index + 1, num_experts + 1)[..., 1:]` is [T, 2, E], with zeros for a missing choice.",
        "`first.cumsum(0) - first` choices are ahead of a first choice; for a second choice, add all of "
        "`first.sum(0)`.",
        "Multiply these counts by the one-hot rows and sum over the experts; then put -1 where the index is -1.",
    ),
)


def keep_and_weigh(
    probs: Tensor, expert_index: Tensor, position: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """probs [T, E], expert_index and position [T, 2] (-1: none) -> (kept [T, 2] bool, gates [T, 2])."""
    kept = (position >= 0) & (position < capacity)
    chosen = probs.gather(1, expert_index.clamp(min=0)) * kept
    total = chosen.sum(dim=1, keepdim=True)
    return kept, chosen / total.where(total > 0, 1)


def _draw_queue(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    expert_index, E = _draw_choices_with_gaps(generator)
    probs = torch.randn(len(expert_index), E, generator=generator).softmax(dim=1)
    capacity = int(torch.randint(1, 5, (), generator=generator))
    return probs, expert_index, queue_positions(expert_index, E), capacity


def _keep_one_too_many(
    probs: Tensor, expert_index: Tensor, position: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    return keep_and_weigh(probs, expert_index, position, capacity + 1)


def _keep_what_is_missing(
    probs: Tensor, expert_index: Tensor, position: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    return keep_and_weigh(probs, expert_index.clamp(min=0), position.clamp(min=0), capacity)


def _weigh_before_dropping(
    probs: Tensor, expert_index: Tensor, position: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    kept = (position >= 0) & (position < capacity)
    chosen = probs.gather(1, expert_index.clamp(min=0)) * (expert_index >= 0)
    total = chosen.sum(dim=1, keepdim=True)
    return kept, chosen / total.where(total > 0, 1) * kept


def _weigh_by_nothing(
    probs: Tensor, expert_index: Tensor, position: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    kept = (position >= 0) & (position < capacity)
    chosen = probs.gather(1, expert_index.clamp(min=0)) * kept
    return kept, chosen / chosen.sum(dim=1, keepdim=True)


_KEEP = Exercise(
    key="03.4",
    title="Keep and weigh",
    task="Write `keep_and_weigh`: which choices find room, and their gates, normalised *after* dropping: a token's "
    "kept probabilities divided by their sum. A token that lost both gets 0 and 0.",
    difficulty="medium",
    importance="essential",
    minutes=10,
    solution=keep_and_weigh,
    is_piece=True,
    draw=_draw_queue,
    mistakes=(
        Mistake(_keep_one_too_many, "You keep one too many: with C slots the last valid position is C - 1."),
        Mistake(
            _keep_what_is_missing,
            "You keep choices that were never made: their position is -1, which is below any capacity.",
        ),
        Mistake(
            _weigh_before_dropping,
            "You divided by the sum of both choices, so a lone survivor has less than 1. Divide by what was kept.",
        ),
        Mistake(_weigh_by_nothing, "For a token that lost both choices you divide 0 by 0, which is NaN."),
    ),
    hints=(
        "A choice is kept if its position is at least 0 and below `capacity`.",
        "`probs.gather(1, expert_index.clamp(min=0)) * kept`: a dropped choice has weight 0.",
        "Divide by the row's sum, but by 1 where that sum is 0.",
    ),
)


def first_places_by_priority(probs: Tensor) -> Tensor:
    """probs [T, E] -> [T] int64: each token's place in its first expert's queue, most confident first."""
    first = F.one_hot(probs.argmax(dim=1), probs.shape[1])
    order = probs.amax(dim=1).argsort(descending=True, stable=True)
    queue = first[order]
    place = ((queue.cumsum(0) - queue) * queue).sum(1)
    return torch.empty_like(place).scatter(0, order, place)


def _draw_probs(generator: torch.Generator) -> tuple[Tensor]:
    T = int(torch.randint(10, 25, (), generator=generator))
    E = int(torch.randint(2, 5, (), generator=generator))
    return ((2 * torch.randn(T, E, generator=generator)).softmax(dim=1),)


def _places_in_batch_order(probs: Tensor) -> Tensor:
    first = F.one_hot(probs.argmax(dim=1), probs.shape[1])
    return ((first.cumsum(0) - first) * first).sum(1)


def _places_not_put_back(probs: Tensor) -> Tensor:
    order = probs.amax(dim=1).argsort(descending=True, stable=True)
    return _places_in_batch_order(probs[order])


def _places_of_the_least_confident_first(probs: Tensor) -> Tensor:
    first = F.one_hot(probs.argmax(dim=1), probs.shape[1])
    order = probs.amax(dim=1).argsort(stable=True)
    place = ((first[order].cumsum(0) - first[order]) * first[order]).sum(1)
    return torch.empty_like(place).scatter(0, order, place)


_PRIORITY = Exercise(
    key="03.5",
    title="The most confident first",
    task="With batch priority, tokens queue by descending top probability. Write `first_places_by_priority`: each "
    "token's place among the first choices of its expert, returned in the *order of the batch*.",
    difficulty="hard",
    importance="important",
    minutes=12,
    solution=first_places_by_priority,
    draw=_draw_probs,
    mistakes=(
        Mistake(
            _places_in_batch_order,
            "Your tokens queue in the order of the batch: sort them by top probability.",
        ),
        Mistake(
            _places_not_put_back,
            "The places are right, but in the order of the queue: your first number belongs to the most confident "
            "token, not to the first one. Put them back.",
        ),
        Mistake(
            _places_of_the_least_confident_first,
            "The least confident token comes first in your queue: sort in descending order.",
        ),
    ),
    hints=(
        "Sort the tokens, find places with a cumulative sum, then undo the sorting.",
        "If `order` sorts the tokens, `result.scatter(0, order, place)` puts each place back where it came from.",
    ),
)

_SAME_TWO = Exercise(
    key="03.6",
    title="Everybody wants the same two",
    task="A batch has 64 tokens and 4 experts, at a capacity factor of 1. All tokens choose expert 0 first and expert "
    "1 second. What share of the tokens, from 0 to 1, finds no expert at all?",
    difficulty="medium",
    importance="important",
    minutes=4,
    solution=0.5,
    mistakes=(
        Mistake(
            0.0,
            "Both experts together have 64 slots for 64 tokens. But which tokens have the slots of expert 0, and "
            "which those of expert 1?",
        ),
        Mistake(0.75, "That is one choice per token: the capacity counts two, 2 × 64 / 4 slots."),
        Mistake(50, "That is a percentage. A share is from 0 to 1."),
        Mistake(0.25, "How many slots does each expert have, and do the two experts keep different tokens?"),
    ),
    hints=(
        "Each expert has 2 × 64 / 4 = 32 slots.",
        "Both queues have the same order, so both experts keep the same tokens.",
    ),
)

EXERCISES = (_CAPACITY, _SMALLEST, _POSITIONS, _KEEP, _PRIORITY, _SAME_TWO)
