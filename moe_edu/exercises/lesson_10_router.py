"""Bugs in published routers: what is counted, masked and remembered, and what the gates sum to."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.exercises.exercise import Exercise, Mistake

NLLB = "`modeling_nllb_moe.py`"


def randint(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=generator))


# ---- 10.1


def words_taken(top_1_mask: Tensor) -> Tensor:
    """top_1_mask [T, E], a row of zeros where dropped or padded -> [E]: words that each expert took."""
    return top_1_mask.sum(dim=0)


def _published_words_taken(top_1_mask: Tensor) -> Tensor:
    """top_1_mask [T, E], a row of zeros where dropped or padded -> [E]: words that each expert took."""
    expert = top_1_mask.argmax(dim=1)
    return F.one_hot(expert, top_1_mask.shape[1]).sum(dim=0)


def _draw_top_1_mask(generator: torch.Generator) -> tuple[Tensor]:
    E = randint(generator, 3, 6)
    T = E + randint(generator, 3, 7)
    chosen = torch.randint(E, (T,), generator=generator)
    chosen[0] = 0
    routed = torch.rand(T, generator=generator) < 0.7
    routed[0], routed[1] = True, False
    return (F.one_hot(chosen, E) * routed[:, None],)


def _nothing_for_expert_0(top_1_mask: Tensor) -> Tensor:
    taken = _published_words_taken(top_1_mask)
    taken[0] = 0
    return taken


_WORDS_TAKEN = Exercise(
    key="10.1",
    title="The popular expert 0",
    task="Expert 0 seems to take words that never chose it. Fix the count. **The test that catches it:** the counts "
    "add up to the number of words that found room.",
    difficulty="easy",
    importance="essential",
    minutes=3,
    solution=words_taken,
    starter=_published_words_taken,
    origin=f"transformers 4.57.6, {NLLB}",
    draw=_draw_top_1_mask,
    mistakes=(
        Mistake(_nothing_for_expert_0, "Expert 0 did take some words, and your count leaves them out."),
        Mistake(lambda top_1_mask: top_1_mask.sum(dim=1), "That is one number per word. Count per expert."),
    ),
    hints=(
        "What is the argmax of a row of zeros?",
        "Which sum over the mask counts the words of an expert? No argmax is needed.",
    ),
)


# ---- 10.2


def choices_of_words(top_1_mask: Tensor, attention_mask: Tensor) -> Tensor:
    """top_1_mask [T, E], attention_mask [T] (1 word, 0 padding) -> [T, E]: the choices of the words."""
    is_word = attention_mask.bool()
    return top_1_mask * is_word[:, None]


def _published_choices_of_words(top_1_mask: Tensor, attention_mask: Tensor) -> Tensor:
    """top_1_mask [T, E], attention_mask [T] (1 word, 0 padding) -> [T, E]: the choices of the words."""
    is_word = ~attention_mask.bool()
    return top_1_mask * is_word[:, None]


def _draw_masks(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    T, E = randint(generator, 4, 9), randint(generator, 2, 5)
    words = randint(generator, 1, T)
    chosen = torch.randint(E, (T,), generator=generator)
    return F.one_hot(chosen, E), (torch.arange(T) < words).long()


def _choices_of_not_an_integer(top_1_mask: Tensor, attention_mask: Tensor) -> Tensor:
    return top_1_mask * ~attention_mask[:, None]


_CHOICES_OF_WORDS = Exercise(
    key="10.2",
    title="The mask the wrong way round",
    task="The layer's documentation asks for an attention mask, but given one, its output is zero everywhere. Fix "
    "it. **The test:** words come out changed, padding does not.",
    difficulty="easy",
    importance="important",
    minutes=3,
    solution=choices_of_words,
    starter=_published_choices_of_words,
    origin=f"transformers 4.57.6, {NLLB}",
    draw=_draw_masks,
    mistakes=(
        Mistake(
            lambda top_1_mask, attention_mask: top_1_mask,
            "Now padding chooses experts too, and takes up their slots.",
        ),
        Mistake(_choices_of_not_an_integer, "`~` of the integer 1 is -2. It means “not” for booleans only."),
    ),
    hints=(
        "In an attention mask, what does 1 stand for? And after `~`?",
        "The code was written for a padding mask, which is True where padded. Yours is 1 for words.",
    ),
)


# ---- 10.3


def capacities(tokens: list[int], training: list[bool], num_experts: int) -> list[int]:
    """The capacity of each batch of T tokens: 2 * ceil(T / E) if it is trained on, else T."""
    result = []
    for T, trains in zip(tokens, training, strict=True):
        result.append(2 * math.ceil(T / num_experts) if trains else T)
    return result


def _published_capacities(tokens: list[int], training: list[bool], num_experts: int) -> list[int]:
    """The capacity of each batch of T tokens: 2 * ceil(T / E) if it is trained on, else T."""
    capacity, result = None, []
    for T, trains in zip(tokens, training, strict=True):
        if not trains:
            capacity = T
        elif capacity is None:
            capacity = 2 * math.ceil(T / num_experts)
        result.append(capacity)
    return result


def _draw_batches(generator: torch.Generator) -> tuple[list[int], list[bool], int]:
    E = randint(generator, 3, 6)
    tokens = torch.randperm(8, generator=generator)[: randint(generator, 4, 7)].add(1).mul(E).tolist()
    training = [True, False, True] + [randint(generator, 0, 2) == 1 for _ in tokens[3:]]
    return tokens, training, E


def _capacities_of_first_batch(tokens: list[int], training: list[bool], num_experts: int) -> list[int]:
    first = 2 * math.ceil(tokens[training.index(True)] / num_experts)
    return [first if trains else T for T, trains in zip(tokens, training, strict=True)]


def _capacities_all_trained(tokens: list[int], training: list[bool], num_experts: int) -> list[int]:
    return [2 * math.ceil(T / num_experts) for T in tokens]


_CAPACITIES = Exercise(
    key="10.3",
    title="An evaluation that changes training",
    task="The router keeps its capacity from batch to batch. Fix it. **The test that catches it:** a training step "
    "gives the same result after an evaluation as before.",
    difficulty="easy",
    importance="essential",
    minutes=4,
    solution=capacities,
    starter=_published_capacities,
    origin=f"transformers 4.57.6, {NLLB}",
    draw=_draw_batches,
    mistakes=(
        Mistake(
            _capacities_of_first_batch,
            "The first training batch still decides for all later ones, which have other sizes.",
        ),
        Mistake(
            _capacities_all_trained,
            "An evaluated batch gets one place per token, so that nothing is dropped.",
        ),
    ),
    hints=(
        "Which variable lives longer than one batch?",
        "Compute the capacity of each batch from that batch alone, and store it nowhere.",
    ),
)


# ---- 10.4


def sampled_second(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Router logits, Gumbel noise [T, E] -> sampled second choices [T], logits for the losses [T, E]."""
    first = logits.argmax(dim=1, keepdim=True)
    noisy = logits + noise
    second = noisy.scatter(1, first, -torch.inf).argmax(dim=1)
    return second, logits


def _published_sampled_second(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Router logits, Gumbel noise [T, E] -> sampled second choices [T], logits for the losses [T, E]."""
    first = logits.argmax(dim=1, keepdim=True)
    logits += noise
    second = logits.scatter(1, first, -torch.inf).argmax(dim=1)
    return second, logits


def _draw_noisy_logits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    T, E = randint(generator, 4, 9), randint(generator, 4, 7)
    noise = -torch.empty(T, E).exponential_(generator=generator).log()
    return torch.randn(T, E, generator=generator), noise


def _sampled_first_too(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return (logits + noise).topk(2, dim=1).indices[:, 1], logits


def _second_without_noise(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return logits.topk(2, dim=1).indices[:, 1], logits


_SAMPLED_SECOND = Exercise(
    key="10.4",
    title="Noise that outlives its use",
    task="Sampling a second expert changes the logits that the losses receive. Fix it. **The test that catches it:** "
    "a function leaves its arguments as they were.",
    difficulty="medium",
    importance="important",
    minutes=4,
    solution=sampled_second,
    starter=_published_sampled_second,
    origin=f"transformers 5.23.0, {NLLB}",
    draw=_draw_noisy_logits,
    mistakes=(
        Mistake(_sampled_first_too, "You added the noise before the first choice: that one is not sampled."),
        Mistake(
            _second_without_noise, "Without noise the second choice is never sampled: that is policy “all”."
        ),
    ),
    hints=(
        "`a += b` and `a = a + b` look alike. Which of them writes into the caller's tensor?",
        "Give the sum its own name, and return the logits unchanged.",
    ),
)


# ---- 10.5


def gates(logits: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
    """logits [T, E], chosen [T, 2], kept [T, 2] -> gates [T, 2]: sum 1, or 0 if none is kept."""
    scores = logits.gather(1, chosen).masked_fill(~kept, torch.finfo(logits.dtype).min)
    return scores.softmax(dim=1) * kept


def _published_gates(logits: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
    """logits [T, E], chosen [T, 2], kept [T, 2] -> gates [T, 2]: sum 1, or 0 if none is kept."""
    p = logits.softmax(dim=1).gather(1, chosen) * kept
    return p / p.sum(dim=1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)


def _draw_survivors(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    T, E = randint(generator, 5, 9), randint(generator, 3, 6)
    logits = 2 * torch.randn(T, E, generator=generator)
    # Two words are so sure of their first choice that the second is nearly, or exactly, 0 in fp32.
    for word, gap in ((0, 22.0), (1, 200.0)):
        logits[word, randint(generator, 0, E)] += gap + 10
    kept = torch.rand(T, 2, generator=generator) < 0.7
    kept[:4] = torch.tensor([[False, True], [False, True], [False, False], [True, False]])
    return logits, logits.topk(2, dim=1).indices, kept


def _gates_with_a_smaller_floor(logits: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
    p = logits.softmax(dim=1).gather(1, chosen) * kept
    return p / p.sum(dim=1, keepdim=True).clamp(min=1e-30)


def _gates_before_dropping(logits: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
    return logits.gather(1, chosen).softmax(dim=1) * kept


def _gates_with_nan(logits: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
    return logits.gather(1, chosen).masked_fill(~kept, -torch.inf).softmax(dim=1)


def _gates_without_floor(logits: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
    p = logits.softmax(dim=1).gather(1, chosen) * kept
    return p / p.sum(dim=1, keepdim=True)


_GATES = Exercise(
    key="10.5",
    title="The lone survivor",
    task="A word whose first choice was dropped keeps its second, but its gate is far below 1. Fix it. **The test:** "
    "gates sum to 1, or to 0 where nothing was kept.",
    difficulty="hard",
    importance="important",
    minutes=8,
    solution=gates,
    starter=_published_gates,
    origin=f"transformers 4.57.6, {NLLB}",
    draw=_draw_survivors,
    mistakes=(
        Mistake(
            _gates_with_a_smaller_floor,
            "A smaller floor helps some words. Where the probability is exactly 0 in fp32, no floor helps.",
        ),
        Mistake(
            _gates_before_dropping, "You normalised before dropping, so a lone survivor gets less than 1."
        ),
        Mistake(
            _gates_without_floor,
            "0 / 0 is NaN: where nothing was kept, and where all that was kept rounds to 0 in fp32.",
        ),
        Mistake(_gates_with_nan, "Where nothing was kept, a softmax over -inf alone is NaN."),
    ),
    hints=(
        "How large is exp(-20)? The published code never divides by less than 1e-7.",
        "A softmax over the kept choices' logits involves no small probability at all.",
        "Fill dropped choices with `torch.finfo(logits.dtype).min`, take the softmax, and multiply by `kept`.",
    ),
)


# ---- 10.6


def random_gates(probs: Tensor, chosen: Tensor, uniform: Tensor) -> Tensor:
    """probs [T, E], chosen [T, 2], uniform [T] -> gates [T, 2]; a second choice may be given up."""
    p = probs.gather(1, chosen)
    first, second = (p / p.sum(dim=1, keepdim=True)).unbind(dim=1)
    keep = 2 * p[:, 1] > uniform
    return torch.stack([first, second * keep], dim=1)


def _published_random_gates(probs: Tensor, chosen: Tensor, uniform: Tensor) -> Tensor:
    """probs [T, E], chosen [T, 2], uniform [T] -> gates [T, 2]; a second choice may be given up."""
    p = probs.gather(1, chosen)
    first, second = (p / p.sum(dim=1, keepdim=True)).unbind(dim=1)
    second = p[:, 1]
    keep = 2 * second > uniform
    return torch.stack([first, second * keep], dim=1)


def _draw_random_policy(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    T, E = randint(generator, 6, 12), randint(generator, 3, 7)
    probs = torch.randn(T, E, generator=generator).softmax(dim=1)
    return probs, probs.topk(2, dim=1).indices, torch.rand(T, generator=generator)


def _random_gates_of_share(probs: Tensor, chosen: Tensor, uniform: Tensor) -> Tensor:
    p = probs.gather(1, chosen)
    first, second = (p / p.sum(dim=1, keepdim=True)).unbind(dim=1)
    return torch.stack([first, second * (2 * second > uniform)], dim=1)


def _random_gates_renormalised(probs: Tensor, chosen: Tensor, uniform: Tensor) -> Tensor:
    weights = random_gates(probs, chosen, uniform)
    return weights / weights.sum(dim=1, keepdim=True)


_RANDOM_GATES = Exercise(
    key="10.6",
    title="The second gate that fell behind",
    task="Policy “random”, normalised before dropping: the gates of a word that keeps both experts do not sum to 1. "
    "Fix it. That sum is the test; the draw, $2 p_2 > u$, stays unchanged.",
    difficulty="medium",
    importance="helpful",
    minutes=5,
    solution=random_gates,
    starter=_published_random_gates,
    origin=f"transformers 4.57.6, {NLLB}",
    draw=_draw_random_policy,
    mistakes=(
        Mistake(
            _random_gates_of_share,
            "The gates are right now, but the draw compares the raw probability, not the share.",
        ),
        Mistake(
            _random_gates_renormalised,
            "You normalised again after giving up. When you normalise *before*, the share of a choice given up is "
            "lost.",
        ),
    ),
    hints=(
        "One name means two things here, first a share and then a probability.",
        "Use `p[:, 1]` for the draw only, and leave `second` as it was.",
    ),
)


EXERCISES = (_WORDS_TAKEN, _CHOICES_OF_WORDS, _CAPACITIES, _SAMPLED_SECOND, _GATES, _RANDOM_GATES)
