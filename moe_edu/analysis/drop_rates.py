"""Drop rates: a bilingual batch, a skew that makes some experts popular, and the share of tokens that no expert takes.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_edu.config import MoEConfig
from moe_edu.moe.routing import expert_capacity, top2_gating

_SENTENCES = {
    "eng": "the old cat sleeps on a chair and my dog eats bread",
    "fra": "le vieux chat dort sur une chaise mon chien mange du pain",
}
_EXPERTS, _FEATURES, _SEED = 8, 4, 12


class BilingualBatch(NamedTuple):
    """Two sentences with nearly the same meaning: T=24 words, E=8 experts.

    Attributes:
        words: the T words, English first.
        languages: the T language codes, `eng` or `fra`.
        logits: `[T, E]` float64 to three decimals, from a router drawn at random.
    """

    words: tuple[str, ...]
    languages: tuple[str, ...]
    logits: Tensor


def bilingual_batch() -> BilingualBatch:
    """A new copy of the batch, the same each time: the router is drawn from a fixed seed."""
    languages, words = zip(
        *((code, word) for code, text in _SENTENCES.items() for word in text.split()), strict=True
    )
    generator = torch.Generator().manual_seed(_SEED)
    hidden = torch.randn(len(words), _FEATURES, generator=generator, dtype=torch.float64)
    weight = torch.randn(_EXPERTS, _FEATURES, generator=generator, dtype=torch.float64)
    return BilingualBatch(words, languages, (hidden @ weight.T / 2).round(decimals=3))


def skew_logits(logits: Tensor, skew: float) -> Tensor:
    """`[T, E] -> [T, E]`: add `skew` for expert 0, less for each following expert, and nothing for the last.

    So all tokens come to prefer the same experts, as they do when nothing balances a router.
    """
    pull = torch.linspace(1, 0, logits.shape[1], dtype=logits.dtype, device=logits.device)
    return logits + skew * pull


def drop_rates(
    logits: Tensor, factors: Sequence[float], skews: Sequence[float], *, batch_prioritized: bool = False
) -> Tensor:
    """The share of tokens that no expert takes, for each skew and capacity factor.

    Args:
        logits: `[T, E]` of one training batch.
        factors: F capacity factors.
        skews: S values for `skew_logits`.
        batch_prioritized: queue by descending top probability.

    Returns:
        `[S, F]` float64, from 0 to 1.
    """
    T, E = logits.shape

    def rate(skew: float, factor: float) -> float:
        capacity = expert_capacity(T, MoEConfig(num_experts=E, expert_capacity_factor=factor), training=True)
        routing = top2_gating(
            skew_logits(logits, skew), capacity=capacity, batch_prioritized=batch_prioritized
        )
        return 1 - int(routing.kept.any(dim=1).sum()) / T

    return torch.tensor([[rate(skew, factor) for factor in factors] for skew in skews], dtype=torch.float64)
