"""Exercises of lesson 05, losses and metrics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.exercises.exercise import Exercise, Mistake

# ---- 05.1


def balancing_loss(probs: Tensor, expert_index: Tensor) -> Tensor:
    """probs [T, E], expert_index [T, 2] (first and second choice) -> a scalar: E * sum_e f_e * P_e."""
    T, E = probs.shape
    f = torch.bincount(expert_index[:, 0], minlength=E) / T
    return E * (f * probs.mean(dim=0)).sum()


def _draw_routing(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    T, E = (int(torch.randint(low, 9, (), generator=generator)) for low in (4, 3))
    logits = 2 * torch.randn(T, E, generator=generator) + torch.randn(E, generator=generator)
    return logits.softmax(dim=1), logits.topk(2, dim=1).indices


def _balance_all_choices(probs: Tensor, expert_index: Tensor) -> Tensor:
    T, E = probs.shape
    f = torch.bincount(expert_index.flatten(), minlength=E) / T
    return E * (f * probs.mean(dim=0)).sum()


def _balance_without_experts(probs: Tensor, expert_index: Tensor) -> Tensor:
    return balancing_loss(probs, expert_index) / probs.shape[1]


def _balance_from_probs(probs: Tensor, expert_index: Tensor) -> Tensor:
    return probs.shape[1] * probs.mean(dim=0).square().sum()


_BALANCE = Exercise(
    key="05.1",
    title="The balancing loss",
    task="Write `balancing_loss`: $E \\sum_e f_e P_e$, where $f_e$ is the share of tokens whose first choice is $e$ "
    "and $P_e$ is its mean probability. The model you assemble in lesson 6 will train with it.",
    difficulty="medium",
    importance="essential",
    minutes=10,
    solution=balancing_loss,
    is_piece=True,
    draw=_draw_routing,
    mistakes=(
        Mistake(_balance_all_choices, "You counted second choices too. Here f counts first choices only."),
        Mistake(
            _balance_without_experts,
            "Even routing should cost 1, whatever the number of experts. What is missing in front of the sum?",
        ),
        Mistake(
            _balance_from_probs,
            "You used the mean probability in place of f. f counts what the router chose; P averages its "
            "probabilities.",
        ),
    ),
    hints=(
        "f is a count of `expert_index[:, 0]`, divided by the tokens; P is the mean of `probs` over the tokens.",
        "`torch.bincount(..., minlength=E)` also counts experts that nobody chose.",
    ),
)

# ---- 05.2


def router_z(logits: Tensor) -> Tensor:
    """logits [T, E] -> a scalar: the mean over tokens of logsumexp squared."""
    return logits.logsumexp(dim=1).square().mean()


def _draw_logits(generator: torch.Generator) -> tuple[Tensor]:
    T, E = torch.randint(2, 9, (2,), generator=generator).tolist()
    logits = 3 * torch.randn(T, E, generator=generator)
    logits[0] += 100.0  # exp(100) is more than float32 can hold
    return (logits,)


def _z_of_mean(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=1).mean().square()


def _z_not_squared(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=1).mean()


def _z_overflows(logits: Tensor) -> Tensor:
    return logits.exp().sum(dim=1).log().square().mean()


_ROUTER_Z = Exercise(
    key="05.2",
    title="The router z-loss",
    task="Write `router_z`: the mean over tokens of $(\\log \\sum_e \\exp x_e)^2$. It must not overflow at logits of "
    "100. The model you assemble in lesson 6 will train with it.",
    difficulty="easy",
    importance="essential",
    minutes=5,
    solution=router_z,
    is_piece=True,
    draw=_draw_logits,
    mistakes=(
        Mistake(_z_of_mean, "You squared the mean. Square each token's value, then take the mean."),
        Mistake(_z_not_squared, "Without the square, very negative logits would be rewarded without limit."),
        Mistake(
            _z_overflows,
            "Right on paper, but exp(100) is infinite in float32. Which function subtracts the largest logit first?",
        ),
    ),
    hints=("One number for each token, squared, then the mean.", "`torch.logsumexp` does not overflow."),
)

# ---- 05.3


def mean_probability(gate_logits: Tensor) -> Tensor:
    """gate_logits [T, E] -> P [E]: the mean probability of each expert."""
    return gate_logits.softmax(dim=-1).mean(dim=0)


def _published_mean_probability(gate_logits: Tensor) -> Tensor:
    """gate_logits [T, E] -> P [E]: the mean probability of each expert."""
    routing_weights = gate_logits.topk(2, dim=-1).values.softmax(dim=-1)
    return routing_weights.mean(dim=-1)


def _draw_gate_logits(generator: torch.Generator) -> tuple[Tensor]:
    T, E = (int(torch.randint(low, 9, (), generator=generator)) for low in (3, 3))
    return (2 * torch.randn(T, E, generator=generator),)


def _mean_over_experts(gate_logits: Tensor) -> Tensor:
    return gate_logits.softmax(dim=-1).mean(dim=-1)


def _softmax_of_mean(gate_logits: Tensor) -> Tensor:
    return gate_logits.mean(dim=0).softmax(dim=-1)


_CONSTANT = Exercise(
    key="05.3",
    title="Spot the bug: a loss that never moves",
    task="The published balancing loss multiplied f by this P, which is always the same, so it balanced nothing. "
    "Print `mean_probability(torch.randn(4, 3))`, see why, and fix it.",
    difficulty="medium",
    importance="important",
    minutes=10,
    solution=mean_probability,
    starter=_published_mean_probability,
    origin="transformers 4.36.0, `models/mixtral/modeling_mixtral.py` (`load_balancing_loss_func`), simplified",
    draw=_draw_gate_logits,
    mistakes=(
        Mistake(
            _mean_over_experts,
            "The softmax is right now, but you average over the experts: probabilities that sum to 1 always average "
            "to 1/E. Average over the tokens.",
        ),
        Mistake(
            _softmax_of_mean, "Take each token's probabilities first, then their mean: softmax is not linear."
        ),
    ),
    hints=(
        "Two numbers that sum to 1 have the mean 0.5, whatever they are.",
        "P is about *all* experts: a softmax over E, and a mean over T.",
    ),
)

# ---- 05.4


def smoothed_loss(log_probs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """log_probs [T, V], targets [T] -> [T]: cross-entropy with T5X's soft target, no entropy subtracted.

    The soft target is 1 - smoothing on the target and smoothing / (V - 1) on each other class.
    """
    V = log_probs.shape[1]
    soft = torch.full_like(log_probs, smoothing / (V - 1)).scatter(1, targets[:, None], 1 - smoothing)
    return -(soft * log_probs).sum(dim=1)


def _draw_log_probs(generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    T, V = (int(torch.randint(low, 9, (), generator=generator)) for low in (2, 3))
    log_probs = (2 * torch.randn(T, V, generator=generator)).log_softmax(dim=1)
    targets = torch.randint(0, V, (T,), generator=generator)
    return log_probs, targets, 0.1 + 0.3 * float(torch.rand((), generator=generator))


def _smoothed_over_all(log_probs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(log_probs, targets, reduction="none", label_smoothing=smoothing)


def _not_smoothed(log_probs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    return -log_probs.gather(1, targets[:, None])[:, 0]


def _smoothed_target_only(log_probs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    return (1 - smoothing) * -log_probs.gather(1, targets[:, None])[:, 0]


_SMOOTHED = Exercise(
    key="05.4",
    title="Smoothed cross-entropy",
    task="Write `smoothed_loss` with T5X's soft target: `1 - smoothing` on the target, the rest shared equally by "
    "the *other* V - 1 classes. One value per token; do not subtract the entropy.",
    difficulty="medium",
    importance="important",
    minutes=10,
    solution=smoothed_loss,
    draw=_draw_log_probs,
    mistakes=(
        Mistake(
            _smoothed_over_all,
            "That is PyTorch's smoothing, which shares the rest among *all* V classes, the target included.",
        ),
        Mistake(_not_smoothed, "Nothing is smoothed yet: the other classes should have a little weight."),
        Mistake(_smoothed_target_only, "The target's weight is right. Where is the rest of the weight?"),
    ),
    hints=(
        "Build the soft target `[T, V]`; then the loss is minus the sum of soft target times log-probability.",
        "`torch.full_like(log_probs, low).scatter(1, targets[:, None], confidence)`.",
    ),
)

# ---- 05.5


def left_behind(kept: Tensor, padding: Tensor) -> Tensor:
    """kept [T, 2] bool, padding [T] bool (True: padded) -> the share of words that no expert took."""
    alone = ~kept.any(dim=1) & ~padding
    return alone.sum() / (~padding).sum()


def _draw_kept(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    T = int(torch.randint(5, 12, (), generator=generator))
    padding = torch.rand(T, generator=generator) < 0.3
    padding[:2] = torch.tensor([False, True])
    kept = (torch.rand(T, 2, generator=generator) < 0.5) & ~padding[:, None]
    return kept, padding


def _left_behind_choices(kept: Tensor, padding: Tensor) -> Tensor:
    return (~kept[~padding]).float().mean()


def _left_behind_pads(kept: Tensor, padding: Tensor) -> Tensor:
    return (~kept.any(dim=1)).float().mean()


def _left_behind_any(kept: Tensor, padding: Tensor) -> Tensor:
    return (~kept[~padding].all(dim=1)).float().mean()


def _left_behind_of_all(kept: Tensor, padding: Tensor) -> Tensor:
    return (~kept.any(dim=1) & ~padding).float().mean()


_LEFT_BEHIND = Exercise(
    key="05.5",
    title="Left behind",
    task="Write `left_behind`: of the tokens that are not padding, the share that lost *both* choices. Padding has "
    "no kept choice and must not count.",
    difficulty="easy",
    importance="important",
    minutes=5,
    solution=left_behind,
    draw=_draw_kept,
    mistakes=(
        Mistake(
            _left_behind_choices, "You counted choices. A token with one kept choice is not left behind."
        ),
        Mistake(
            _left_behind_pads,
            "Your padding counts as left behind: a batch with much padding would look like a bad router.",
        ),
        Mistake(
            _left_behind_of_all,
            "You divided by all tokens. Padding counts in neither the numerator nor the denominator.",
        ),
        Mistake(_left_behind_any, "A token that lost one choice still has the other."),
    ),
    hints=("`kept.any(dim=1)` says which tokens some expert took.", "Both counts are over real tokens only."),
)

# ---- 05.6


def router_confidence(probs: Tensor, expert_index: Tensor, kept: Tensor) -> Tensor:
    """probs [T, E], expert_index and kept [T, 2] -> a scalar: the kept choices' mean probability."""
    return probs.gather(1, expert_index)[kept].mean()


def _draw_kept_routing(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    probs, expert_index = _draw_routing(generator)
    kept = torch.rand(expert_index.shape, generator=generator) < 0.6
    kept[0] = torch.tensor([False, True])
    return probs, expert_index, kept


def _confidence_of_all(probs: Tensor, expert_index: Tensor, kept: Tensor) -> Tensor:
    return probs.gather(1, expert_index).mean()


def _confidence_of_zeros(probs: Tensor, expert_index: Tensor, kept: Tensor) -> Tensor:
    return (probs.gather(1, expert_index) * kept).mean()


def _confidence_of_gates(probs: Tensor, expert_index: Tensor, kept: Tensor) -> Tensor:
    chosen = probs.gather(1, expert_index) * kept
    return (chosen / chosen.sum(dim=1, keepdim=True).clamp(min=1e-20))[kept].mean()


_CONFIDENCE = Exercise(
    key="05.6",
    title="Router confidence",
    task="Write `router_confidence`: the mean probability, before any normalisation, of the choices that were kept.",
    difficulty="easy",
    importance="helpful",
    minutes=5,
    solution=router_confidence,
    draw=_draw_kept_routing,
    mistakes=(
        Mistake(_confidence_of_all, "Your mean includes dropped choices."),
        Mistake(
            _confidence_of_zeros,
            "You set dropped choices to 0 but still divided by the number of all choices. Divide by the number of "
            "kept ones.",
        ),
        Mistake(
            _confidence_of_gates,
            "Those are the gates, normalised per token. Use the raw probabilities.",
        ),
    ),
    hints=(
        "`probs.gather(1, expert_index)` is `[T, 2]`.",
        "A bool mask picks the kept ones: `values[kept]`.",
    ),
)

EXERCISES = (_BALANCE, _ROUTER_Z, _CONSTANT, _SMOOTHED, _LEFT_BEHIND, _CONFIDENCE)
