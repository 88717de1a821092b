"""Exercises of lesson 00, start here: small ones that show how exercises work."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_edu.exercises.exercise import Exercise, Mistake

_CHOICES = Exercise(
    key="00.1",
    title="How many choices?",
    task="Six words each choose two of four experts. How many choices is that? Run the cell as it is, then with a "
    "wrong number, then with the right one, and read the three replies.",
    difficulty="easy",
    importance="helpful",
    minutes=2,
    solution=12,
    mistakes=(
        Mistake(6, "That is one choice per word. Each word makes two."),
        Mistake(24, "That counts every word with every expert. A word visits only two of the four."),
        Mistake(8, "You counted two choices per expert. It is the words that choose."),
    ),
    hints=("How many choices does one word make?", "Two choices for each of six words."),
)


def gate(score: float, other_score: float) -> float:
    """The gate of the first expert, between 0 and 1, from the scores of both."""
    mine, other = math.exp(score), math.exp(other_score)
    return mine / (mine + other)


def _draw_scores(generator: torch.Generator) -> tuple[float, float]:
    scores = (4 * torch.randn(2, generator=generator)).clamp(-9, 9)
    return round(scores[0].item(), 1), round(scores[1].item(), 1)


def _gate_of_the_other(score: float, other_score: float) -> float:
    return 1 - gate(score, other_score)


def _gate_of_positive_scores(score: float, other_score: float) -> float:
    total = score + other_score
    return score / total if total else 0.5


def _gate_not_shared(score: float, other_score: float) -> float:
    return math.exp(score)


def _gate_as_ratio(score: float, other_score: float) -> float:
    return math.exp(score - other_score)


_GATE = Exercise(
    key="00.2",
    title="Your first gate",
    task="Write `gate`: raise e to both scores (`math.exp`), and return the first one's share of their sum. To see "
    "what an error looks like, divide by 0 first.",
    difficulty="easy",
    importance="important",
    minutes=3,
    solution=gate,
    draw=_draw_scores,
    mistakes=(
        Mistake(
            _gate_of_the_other,
            "That is the share of the other expert: a higher score must give a higher gate.",
        ),
        Mistake(
            _gate_of_positive_scores,
            "You shared the scores themselves, and they may be negative. Raise e to each of them first.",
        ),
        Mistake(
            _gate_as_ratio,
            "You divided the first by the other: that is a ratio. A share is a part of the sum of both.",
        ),
        Mistake(_gate_not_shared, "Almost: divide by the sum of both, so that the two gates add up to 1."),
    ),
    hints=(
        "Two numbers, `math.exp(score)` and `math.exp(other_score)`. What share of their sum is the first?",
        "`mine / (mine + other)`",
    ),
)


def busiest_expert(load: Tensor) -> int:
    """load [E], the number of words that chose each expert -> the number of the busiest expert."""
    return int(load.argmax())


def _busiest_load(load: Tensor) -> int:
    """load [E], the number of words that chose each expert -> the number of the busiest expert."""
    return int(load.max())


def _draw_load(generator: torch.Generator) -> tuple[Tensor]:
    E = int(torch.randint(2, 9, (1,), generator=generator))
    return (torch.randperm(20, generator=generator)[:E],)


def _idlest_expert(load: Tensor) -> int:
    return int(load.argmin())


def _counted_from_1(load: Tensor) -> int:
    return int(load.argmax()) + 1


_BUSIEST = Exercise(
    key="00.3",
    title="Fix it",
    task="`busiest_expert` should return *which* expert is the busiest. It returns something else. Try it on "
    "`torch.tensor([1, 9, 4])`, where the answer is 1, then fix it.",
    difficulty="easy",
    importance="helpful",
    minutes=2,
    solution=busiest_expert,
    starter=_busiest_load,
    draw=_draw_load,
    mistakes=(
        Mistake(_idlest_expert, "That is the least busy expert."),
        Mistake(_counted_from_1, "Experts are numbered from 0, as in all of Python."),
    ),
    hints=(
        "`max` gives the largest value. You want its position.",
        "`load.argmax()` is that position.",
    ),
)

EXERCISES = (_CHOICES, _GATE, _BUSIEST)
