"""Exercises of lesson 07, training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_edu.exercises.exercise import Exercise, Mistake

# ---- 07.1


def shift_right(labels: Tensor, start: int) -> Tensor:
    """labels [B, L] int64 -> [B, L]: what the decoder reads to predict each label."""
    first = torch.full_like(labels[:, :1], start)
    return torch.cat([first, labels[:, :-1]], dim=1)


def _draw_labels(generator: torch.Generator) -> tuple[Tensor, int]:
    B, L = torch.randint(2, 7, (2,), generator=generator).tolist()
    start = int(torch.randint(10, (), generator=generator))
    return torch.randint(10, 99, (B, L), generator=generator), start


def _the_labels(labels: Tensor, start: int) -> Tensor:
    return labels.clone()


def _rolled(labels: Tensor, start: int) -> Tensor:
    return labels.roll(1, dims=1)


def _shifted_left(labels: Tensor, start: int) -> Tensor:
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], start)], dim=1)


def _one_longer(labels: Tensor, start: int) -> Tensor:
    return torch.cat([torch.full_like(labels[:, :1], start), labels], dim=1)


_SHIFT = Exercise(
    key="07.1",
    title="What the decoder reads",
    task=(
        "In training the decoder reads the right answer, delayed by one token. Write `shift_right`: each row begins "
        "with `start`, then come its labels without the last."
    ),
    difficulty="easy",
    importance="essential",
    minutes=5,
    solution=shift_right,
    draw=_draw_labels,
    mistakes=(
        Mistake(
            _the_labels,
            "The decoder would read the very token that it has to write: the loss falls to 0, and it learns to copy.",
        ),
        Mistake(_rolled, "`roll` brings the last label to the front: each row would begin with its own end."),
        Mistake(_shifted_left, "That is one token early: the decoder would see the future."),
        Mistake(
            _one_longer,
            "There is one token too many. What would be written after the last label? Leave that token out.",
        ),
    ),
    hints=("Two pieces side by side: a column of `start`, and a part of the labels.", "`labels[:, :-1]`"),
)

# ---- 07.2


def token_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """logits [B, L, V], labels [B, L], mask [B, L] (1 real, 0 padded) -> the mean loss per real token."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return (losses * mask).sum() / mask.sum()


def _draw_logits(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    B, L, V = torch.randint(3, 8, (3,), generator=generator).tolist()
    lengths = torch.randint(1, L, (B, 1), generator=generator)
    lengths[0], lengths[1] = L, 1
    mask = (torch.arange(L) < lengths).float()
    labels = torch.randint(V, (B, L), generator=generator)  # padded places too: only the mask marks them
    return 2 * torch.randn(B, L, V, generator=generator), labels, mask


def _mean_over_all(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _divided_by_all(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return token_loss(logits, labels, mask) * mask.mean()


def _mean_of_sentences(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return ((losses * mask).sum(dim=1) / mask.sum(dim=1)).mean()


def _summed(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return token_loss(logits, labels, mask) * mask.sum()


_LOSS = Exercise(
    key="07.2",
    title="The loss of a padded batch",
    task=(
        "Write `token_loss`: the mean of $-\\log p(\\text{label})$ over the real tokens of the batch. Padding counts "
        "in neither the numerator nor the denominator."
    ),
    difficulty="medium",
    importance="essential",
    minutes=8,
    solution=token_loss,
    draw=_draw_logits,
    mistakes=(
        Mistake(_mean_over_all, "Padding counts in your mean. The model would learn to write padding."),
        Mistake(
            _divided_by_all,
            "You divide by all places: the same sentence weighs less the more padding the batch has.",
        ),
        Mistake(
            _mean_of_sentences,
            "That is the mean of the sentences' means: a token of a short sentence counts more.",
        ),
        Mistake(_summed, "That is the sum. A mean does not grow with the batch."),
    ),
    hints=(
        '`F.cross_entropy(..., reduction="none")` keeps one loss per token.',
        "Mask, sum, and divide by the mask's sum.",
    ),
)

# ---- 07.3


def learning_rate(peak: float, step: int, warmup_steps: int, total_steps: int) -> float:
    """The rate at a 0-based step: linear warm-up to the peak, times half a cosine down to 0."""
    warmup = min(1.0, (step + 1) / warmup_steps)
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def _draw_schedule(generator: torch.Generator) -> tuple[float, int, int, int]:
    total = int(torch.randint(200, 3000, (), generator=generator))
    warmup = int(torch.randint(20, 150, (), generator=generator))
    last = total if torch.rand((), generator=generator) < 0.5 else warmup
    step = int(torch.randint(0, last, (), generator=generator))
    return float(1e-3 + torch.rand((), generator=generator)), step, warmup, total


def _first_step_is_lost(peak: float, step: int, warmup_steps: int, total_steps: int) -> float:
    return peak * min(1.0, step / warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def _whole_cosine(peak: float, step: int, warmup_steps: int, total_steps: int) -> float:
    warmup = min(1.0, (step + 1) / warmup_steps)
    return peak * warmup * 0.5 * (1 + math.cos(2 * math.pi * step / total_steps))


def _warmup_goes_on(peak: float, step: int, warmup_steps: int, total_steps: int) -> float:
    return peak * (step + 1) / warmup_steps * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def _cosine_after_warmup(peak: float, step: int, warmup_steps: int, total_steps: int) -> float:
    warmup, later = (step + 1) / warmup_steps, (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * (warmup if step < warmup_steps else 0.5 * (1 + math.cos(math.pi * later)))


_SCHEDULE = Exercise(
    key="07.3",
    title="Warm up, then cool down",
    task=(
        "Write `learning_rate`: warm-up is $\\min(1, (\\text{step}+1)/\\text{warmup})$, cooling is "
        "$\\frac12(1 + \\cos(\\pi \\cdot \\text{step}/\\text{total}))$; the rate is peak times both."
    ),
    difficulty="easy",
    importance="helpful",
    minutes=5,
    solution=learning_rate,
    draw=_draw_schedule,
    mistakes=(
        Mistake(
            _first_step_is_lost, "Your first step has a rate of 0 and learns nothing: count it as step one."
        ),
        Mistake(
            _whole_cosine, "Use half a cosine, from 1 down to 0. Yours rises again and ends at the peak."
        ),
        Mistake(
            _cosine_after_warmup,
            "Your cosine begins after the warm-up. Here it runs from step 0, and both factors always apply.",
        ),
        Mistake(_warmup_goes_on, "The warm-up ends at 1. Yours keeps growing."),
    ),
    hints=(
        "`min(1.0, ...)` ends the warm-up.",
        "At step 0 the cosine's factor is 1, at the last step almost 0.",
    ),
    tolerance=1e-6,
)

# ---- 07.4


def clip_gradients(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Gradients of any shapes, scaled by one factor so that their common norm is at most max_norm."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    factor = (max_norm / norm).clamp(max=1.0)
    return [gradient * factor for gradient in gradients]


def _draw_gradients(generator: torch.Generator) -> tuple[list[Tensor], float]:
    scale = 0.02 if torch.rand((), generator=generator) < 0.3 else 2.0
    sizes = torch.randint(2, 6, (3,), generator=generator).tolist()
    gradients = [scale * (1 + i) * torch.randn(size, 3, generator=generator) for i, size in enumerate(sizes)]
    return gradients, 0.5 + float(torch.rand((), generator=generator))


def _each_alone(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    return [gradient * (max_norm / gradient.norm()).clamp(max=1.0) for gradient in gradients]


def _by_value(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    return [gradient.clamp(-max_norm, max_norm) for gradient in gradients]


def _always_scaled(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    return [gradient * max_norm / norm for gradient in gradients]


def _sum_of_norms(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    norm = torch.stack([gradient.norm() for gradient in gradients]).sum()
    return [gradient * (max_norm / norm).clamp(max=1.0) for gradient in gradients]


_CLIP = Exercise(
    key="07.4",
    title="Clip the gradients",
    task=(
        "Write `clip_gradients`: if the norm of all gradients together is above `max_norm`, scale all of them by one "
        "factor; otherwise leave them unchanged. One bad batch then cannot wreck the model."
    ),
    difficulty="medium",
    importance="important",
    minutes=8,
    solution=clip_gradients,
    draw=_draw_gradients,
    mistakes=(
        Mistake(
            _each_alone,
            "You clip each tensor separately, which changes the direction of the step. One factor for all keeps it.",
        ),
        Mistake(
            _sum_of_norms,
            "You added the norms. It is their squares that add up: the norm is the length of one long "
            "vector.",
        ),
        Mistake(
            _by_value,
            "You clamp single numbers, which changes the direction of the step. Scale all of them instead.",
        ),
        Mistake(_always_scaled, "Small gradients should stay small: yours are scaled up to max_norm."),
    ),
    hints=(
        "The norm of the tensors' norms is the norm of all.",
        "The factor is `max_norm / norm`, but never above 1.",
    ),
)

EXERCISES = (_SHIFT, _LOSS, _SCHEDULE, _CLIP)
