"""Exercises of lesson 02, the router."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_edu.exercises.exercise import Exercise, Mistake


def _sizes(generator: torch.Generator) -> list[int]:
    """T from 2 to 8 and E from 3 to 8."""
    return [int(torch.randint(low, 9, (), generator=generator)) for low in (2, 3)]


def _draw_logits(generator: torch.Generator) -> tuple[Tensor]:
    T, E = _sizes(generator)
    return (3 * torch.randn(T, E, generator=generator) - 2,)


def second_choice(logits: Tensor) -> Tensor:
    """logits [T, E] -> [T] int64: the best expert of each token after its first choice."""
    first = logits.argmax(dim=1, keepdim=True)
    return logits.scatter(1, first, -torch.inf).argmax(dim=1)


def _second_after_zero(logits: Tensor) -> Tensor:
    first = logits.argmax(dim=1, keepdim=True)
    return logits.scatter(1, first, 0.0).argmax(dim=1)


def _second_of_reversed(logits: Tensor) -> Tensor:
    return logits.argsort(dim=1)[:, 1]


_SECOND_CHOICE = Exercise(
    key="02.1",
    title="The runner-up",
    task="Write `second_choice`: each token's best expert other than its first choice. Leave `logits` unchanged.",
    difficulty="easy",
    importance="essential",
    minutes=5,
    solution=second_choice,
    draw=_draw_logits,
    mistakes=(
        Mistake(
            _second_after_zero,
            "You replaced the logit of the first choice by 0, and 0 beats every negative logit. Which value loses to "
            "all others?",
        ),
        Mistake(_second_of_reversed, "You sorted from low to high, so yours is the second worst."),
    ),
    hints=(
        "Hide each token's first choice, then take the best again.",
        "`logits.scatter(1, index, value)` gives a changed copy. Which value can never win?",
    ),
)


def top2_choices(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> (probs [T, E], expert_index [T, 2] int64: the first choice, then the second)."""
    return logits.softmax(dim=1), logits.topk(2, dim=1).indices


def _draw_sure_logits(generator: torch.Generator) -> tuple[Tensor]:
    """In about half of the cases the router is so sure that all other probabilities underflow to 0."""
    (logits,) = _draw_logits(generator)
    sure = torch.rand((), generator=generator) < 0.5
    return (logits * (300 if sure else 1),)


def _softmax_over_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.softmax(dim=0), logits.topk(2, dim=1).indices


def _choices_of_probs(logits: Tensor) -> tuple[Tensor, Tensor]:
    probs = logits.softmax(dim=1)
    first = probs.argmax(dim=1, keepdim=True)
    second = probs.scatter(1, first, 0.0).argmax(dim=1, keepdim=True)
    return probs, torch.cat([first, second], dim=1)


def _topk_of_probs(logits: Tensor) -> tuple[Tensor, Tensor]:
    probs = logits.softmax(dim=1)
    return probs, probs.topk(2, dim=1).indices


def _probs_of_two(logits: Tensor) -> tuple[Tensor, Tensor]:
    best = logits.topk(2, dim=1)
    return best.values.softmax(dim=1), best.indices


def _second_choice_first(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.softmax(dim=1), logits.topk(2, dim=1).indices.flip(1)


_TOP2_CHOICES = Exercise(
    key="02.2",
    title="Two choices per token",
    task="Write `top2_choices`: the probabilities over all experts, and each token's two best experts, the best "
    "first. It must be right even where the router is so sure that all other probabilities round to 0.",
    difficulty="medium",
    importance="essential",
    minutes=8,
    solution=top2_choices,
    is_piece=True,
    draw=_draw_sure_logits,
    mistakes=(
        Mistake(
            _softmax_over_tokens,
            "Your softmax runs over the tokens: each column adds up to 1. Each token's probabilities over the "
            "experts must add up to 1.",
        ),
        Mistake(
            _choices_of_probs,
            "You compare probabilities. Where the router is very sure, all but the first are 0 in float32, and a tie "
            "of zeros decides. What has not underflowed?",
        ),
        Mistake(
            _topk_of_probs,
            "You take the two best probabilities. Where the router is very sure, all but one are 0 in float32, and "
            "which of the zeros comes second is arbitrary. What has not underflowed?",
        ),
        Mistake(
            _probs_of_two,
            "These are gates: a softmax over the two chosen experts only. `probs` is over all E experts.",
        ),
        Mistake(_second_choice_first, "Your columns are the wrong way round: the first choice comes first."),
    ),
    hints=(
        "Probabilities come from a softmax over the experts, dimension 1. It keeps the order of the logits.",
        "Choose from the logits, not from the probabilities: `logits.topk(2, dim=1)` has values and indices.",
    ),
)


def gates_before_dropping(probs: Tensor, expert_index: Tensor, kept: Tensor) -> Tensor:
    """probs [T, E], expert_index [T, 2], kept [T, 2] bool -> gates [T, 2], normalised before dropping."""
    chosen = probs.gather(1, expert_index)
    return chosen / chosen.sum(dim=1, keepdim=True) * kept


def _draw_choices(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    T, E = _sizes(generator)
    logits = torch.randn(T, E, generator=generator)
    return logits.softmax(dim=1), logits.topk(2, dim=1).indices, torch.rand(T, 2, generator=generator) < 0.6


def _gates_after_dropping(probs: Tensor, expert_index: Tensor, kept: Tensor) -> Tensor:
    chosen = probs.gather(1, expert_index) * kept
    return chosen / chosen.sum(dim=1, keepdim=True).clamp(min=1e-9)


def _gates_not_normalised(probs: Tensor, expert_index: Tensor, kept: Tensor) -> Tensor:
    return probs.gather(1, expert_index) * kept


def _gates_of_the_dropped_too(probs: Tensor, expert_index: Tensor, kept: Tensor) -> Tensor:
    chosen = probs.gather(1, expert_index)
    return chosen / chosen.sum(dim=1, keepdim=True)


_GATES = Exercise(
    key="02.3",
    title="Normalise before dropping",
    task="Write `gates_before_dropping`: gates that are normalised *before* dropping. Divide a token's two chosen "
    "probabilities by their sum; then set choices that were not kept to 0.",
    difficulty="easy",
    importance="important",
    minutes=6,
    solution=gates_before_dropping,
    draw=_draw_choices,
    mistakes=(
        Mistake(
            _gates_after_dropping,
            "You normalised after dropping: a lone survivor has a gate of 1. Divide by the sum of both, kept or not.",
        ),
        Mistake(_gates_not_normalised, "These are the raw probabilities: divide them by the sum of the two."),
        Mistake(
            _gates_of_the_dropped_too, "The shares are right, but a dropped choice must have a gate of 0."
        ),
    ),
    hints=(
        "`probs.gather(1, expert_index)` fetches the two chosen probabilities of each token.",
        "Divide by their sum along dimension 1 (`keepdim=True`), then multiply by `kept`.",
    ),
)


def sample_second(logits: Tensor, u: Tensor) -> Tensor:
    """logits [T, E], u [T, E] uniform in (0, 1) -> [T] int64: a second expert, by Gumbel noise."""
    first = logits.argmax(dim=1, keepdim=True)
    noisy = logits - torch.log(-torch.log(u))
    return noisy.scatter(1, first, -torch.inf).argmax(dim=1)


def _draw_logits_and_uniform(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    T, E = (size + 4 for size in _sizes(generator))
    uniform = torch.rand(T, E, generator=generator).clamp(0.001, 0.999)
    return torch.randn(T, E, generator=generator), uniform


def _second_with_uniform_noise(logits: Tensor, u: Tensor) -> Tensor:
    first = logits.argmax(dim=1, keepdim=True)
    return (logits + u).scatter(1, first, -torch.inf).argmax(dim=1)


def _second_with_exponential_noise(logits: Tensor, u: Tensor) -> Tensor:
    first = logits.argmax(dim=1, keepdim=True)
    return (logits - torch.log(u)).scatter(1, first, -torch.inf).argmax(dim=1)


def _second_with_noise_of_wrong_sign(logits: Tensor, u: Tensor) -> Tensor:
    first = logits.argmax(dim=1, keepdim=True)
    return (logits + torch.log(-torch.log(u))).scatter(1, first, -torch.inf).argmax(dim=1)


def _second_after_noisy_first(logits: Tensor, u: Tensor) -> Tensor:
    noisy = logits - torch.log(-torch.log(u))
    return noisy.topk(2, dim=1).indices[:, 1]


_SAMPLE_SECOND = Exercise(
    key="02.4",
    title="Draw the second expert",
    task="Write `sample_second`: add Gumbel noise made from `u` to the logits, and take the best expert other than "
    "the first choice. The first choice is not drawn: it comes from the clean logits.",
    difficulty="medium",
    importance="important",
    minutes=8,
    solution=sample_second,
    draw=_draw_logits_and_uniform,
    mistakes=(
        Mistake(
            _second_with_uniform_noise,
            "You added `u` itself. Uniform noise does not sample the softmax; Gumbel noise is `-log(-log(u))`.",
        ),
        Mistake(
            _second_with_exponential_noise,
            "One logarithm gives exponential noise. Gumbel noise takes two: `-log(-log(u))`.",
        ),
        Mistake(
            _second_with_noise_of_wrong_sign,
            "The sign of the noise is wrong: it is minus the logarithm of minus the logarithm.",
        ),
        Mistake(
            _second_after_noisy_first,
            "Your first choice is noisy too, so its runner-up may differ. Find the first choice in the clean logits.",
        ),
    ),
    hints=(
        "Three steps: the first choice from `logits`, noisy scores, then the best of those scores without the first "
        "choice.",
        "`noisy = logits - torch.log(-torch.log(u))`; hide the first choice with `scatter` and `-torch.inf`.",
    ),
)


def give_up_unlikely(probs: Tensor, expert_index: Tensor, u: Tensor) -> Tensor:
    """probs [T, E], expert_index [T, 2], u [T] uniform -> expert_index, -1 for a choice given up."""
    second = expert_index[:, 1]
    p2 = probs.gather(1, expert_index)[:, 1]
    return torch.stack([expert_index[:, 0], second.where(2 * p2 > u, -1)], dim=1)


def _draw_uniform_and_choices(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    T, E = (size + 4 for size in _sizes(generator))
    logits = torch.randn(T, E, generator=generator)
    return logits.softmax(dim=1), logits.topk(2, dim=1).indices, torch.rand(T, generator=generator)


def _give_up_without_factor(probs: Tensor, expert_index: Tensor, u: Tensor) -> Tensor:
    p2 = probs.gather(1, expert_index)[:, 1]
    return torch.stack([expert_index[:, 0], expert_index[:, 1].where(p2 > u, -1)], dim=1)


def _give_up_by_gate(probs: Tensor, expert_index: Tensor, u: Tensor) -> Tensor:
    chosen = probs.gather(1, expert_index)
    gate = chosen[:, 1] / chosen.sum(dim=1)
    return torch.stack([expert_index[:, 0], expert_index[:, 1].where(2 * gate > u, -1)], dim=1)


def _give_up_to_expert_0(probs: Tensor, expert_index: Tensor, u: Tensor) -> Tensor:
    p2 = probs.gather(1, expert_index)[:, 1]
    return torch.stack([expert_index[:, 0], expert_index[:, 1].where(2 * p2 > u, 0)], dim=1)


def _give_up_the_likely(probs: Tensor, expert_index: Tensor, u: Tensor) -> Tensor:
    p2 = probs.gather(1, expert_index)[:, 1]
    return torch.stack([expert_index[:, 0], expert_index[:, 1].where(2 * p2 < u, -1)], dim=1)


_GIVE_UP = Exercise(
    key="02.5",
    title="A second choice worth the trip",
    task="Write `give_up_unlikely`, the policy `random`: keep a token's second choice only if $2 p_2 > u$, where "
    "$p_2$ is its raw probability. Put -1 where it is given up.",
    difficulty="medium",
    importance="important",
    minutes=8,
    solution=give_up_unlikely,
    draw=_draw_uniform_and_choices,
    mistakes=(
        Mistake(
            _give_up_without_factor, "You compare p2 itself with u. The rule is kinder: it compares 2 p2."
        ),
        Mistake(
            _give_up_by_gate,
            "You compare the gate, p2 / (p1 + p2). The raw p2 decides: even a large share of a small probability is "
            "small.",
        ),
        Mistake(
            _give_up_to_expert_0,
            "You send given-up choices to expert 0, which was not chosen but would be counted. Use -1 for no expert.",
        ),
        Mistake(
            _give_up_the_likely,
            "You keep the unlikely ones and give up the likely: reverse the comparison.",
        ),
    ),
    hints=(
        "`probs.gather(1, expert_index)` is [T, 2]; its second column is p2.",
        "`second.where(condition, -1)` keeps a value where the condition holds. Then `torch.stack` both columns, "
        "dim=1.",
    ),
)


def gate_gradient(logits: Tensor) -> Tensor:
    """logits [T, E] -> [T, E]: gradient of each token's first gate, normalised over two choices."""
    best = logits.topk(2, dim=1)
    g1, g2 = best.values.softmax(dim=1).unbind(dim=1)
    slope = g1 * g2
    return torch.zeros_like(logits).scatter(1, best.indices, torch.stack([slope, -slope], dim=1))


def _gradient_of_softmax(logits: Tensor) -> Tensor:
    probs = logits.softmax(dim=1)
    p1, first = probs.max(dim=1, keepdim=True)
    return p1 * (torch.zeros_like(logits).scatter(1, first, 1.0) - probs)


def _gradient_of_one_sign(logits: Tensor) -> Tensor:
    return gate_gradient(logits).abs()


def _gradient_of_second_gate(logits: Tensor) -> Tensor:
    return -gate_gradient(logits)


_GATE_GRADIENT = Exercise(
    key="02.6",
    title="What the router can learn",
    task="Write `gate_gradient`: the derivative of each token's first gate, $g_1 = p_1 / (p_1 + p_2)$, with respect "
    "to its logits, as a formula. The last line of section 5's output is one row of it.",
    difficulty="medium",
    importance="helpful",
    minutes=10,
    solution=gate_gradient,
    draw=_draw_logits,
    mistakes=(
        Mistake(
            _gradient_of_softmax,
            "That is the derivative of p1, which depends on all logits. In g1 all but the two chosen cancel out.",
        ),
        Mistake(
            _gradient_of_one_sign,
            "A higher second logit lowers the first gate: the two derivatives have opposite signs.",
        ),
        Mistake(
            _gradient_of_second_gate, "That is the derivative of the second gate, which goes the other way."
        ),
    ),
    hints=(
        "The first gate is a sigmoid of the difference of the two chosen logits.",
        "The sigmoid's slope is `g1 * g2`: plus at the first choice, minus at the second, 0 elsewhere.",
        "Build it with `torch.zeros_like(logits).scatter(1, indices, values)`.",
    ),
)

_KEPT_BY_CHANCE = Exercise(
    key="02.7",
    title="How often is a second choice kept?",
    task="A word has probabilities 0.20, 0.41, 0.16 and 0.23. What is the probability that the policy `random` keeps "
    "its second choice? Give two decimals.",
    difficulty="easy",
    importance="helpful",
    minutes=2,
    solution=0.46,
    tolerance=0.012,
    mistakes=(
        Mistake(0.23, "That is p2. The rule keeps the choice if 2 p2 > u."),
        Mistake(0.36, "That is the gate, p2 / (p1 + p2). The raw probability decides, doubled."),
        Mistake(0.82, "That is twice p1. The second choice is the runner-up."),
        Mistake(1.0, "A runner-up has at most 0.5, so only a perfect tie would always be kept."),
    ),
    hints=(
        "What is the probability that a uniform number between 0 and 1 is below x?",
        "It is x itself. Here x is 2 p2.",
    ),
)

EXERCISES = (
    _SECOND_CHOICE,
    _TOP2_CHOICES,
    _GATES,
    _SAMPLE_SECOND,
    _GIVE_UP,
    _GATE_GRADIENT,
    _KEPT_BY_CHANCE,
)
