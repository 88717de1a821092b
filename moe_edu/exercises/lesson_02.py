"""Exercises of lesson 02, the router."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_edu.exercises.exercise import Exercise, Mistake


def second_choice(logits: Tensor) -> Tensor:
    """logits [T, E] to [T]: the best expert of each token after its first choice."""
    first = logits.argmax(dim=1, keepdim=True)
    return logits.scatter(1, first, -torch.inf).argmax(dim=1)


def _draw_logits(generator: torch.Generator) -> tuple[Tensor]:
    T, E = torch.randint(2, 9, (2,), generator=generator).tolist()
    return (3 * torch.randn(T, E, generator=generator) - 2,)


def _second_after_zero(logits: Tensor) -> Tensor:
    first = logits.argmax(dim=1, keepdim=True)
    return logits.scatter(1, first, 0.0).argmax(dim=1)


def _second_of_reversed(logits: Tensor) -> Tensor:
    return logits.argsort(dim=1)[:, 1]


_SECOND_CHOICE = Exercise(
    key="02.1",
    title="The runner-up",
    task="Write `second_choice`: for each token the best expert but its first. Leave `logits` as they are.",
    difficulty="easy",
    importance="essential",
    minutes=5,
    solution=second_choice,
    draw=_draw_logits,
    mistakes=(
        Mistake(
            _second_after_zero,
            "You put 0 in the place of the first choice, and 0 beats every negative logit. What loses against all?",
        ),
        Mistake(_second_of_reversed, "You sorted from low to high, so yours is the second worst."),
    ),
    hints=(
        "Hide each token's first choice, then take the best again.",
        "`logits.scatter(1, index, value)` gives a changed copy. Which value can never win?",
    ),
)

EXERCISES = (_SECOND_CHOICE,)
