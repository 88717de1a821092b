"""The six words that every lesson and every explorer follows: `the cat sleeps` and `le chat dort`.

Small enough to follow by hand. The four features and the router's weights are invented, so that results are easy to
predict: no trained router is as tidy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORDS = ("the", "cat", "sleeps", "le", "chat", "dort")
LANGUAGES = ("eng", "eng", "eng", "fra", "fra", "fra")
FEATURES = ("article", "noun", "verb", "French")

_HIDDEN = (
    (1.0, 0.0, 0.0, 0.0),
    (0.0, 1.0, 0.0, 0.0),
    (0.0, 0.0, 1.0, 0.0),
    (1.0, 0.0, 0.0, 1.0),
    (0.0, 1.0, 0.0, 1.0),
    (0.0, 0.0, 1.0, 1.0),
)
_ROUTER_WEIGHT = (
    (2.0, 0.5, 0.0, 0.5),
    (0.5, 2.0, 0.3, 0.0),
    (0.0, 0.4, 1.5, 0.5),
    (0.2, 0.3, 1.0, 1.5),
)


class SixWords(NamedTuple):
    """The example as tensors, T=6 words, D=4 features, E=4 experts.

    Attributes:
        words: the T words.
        languages: the T language codes, `eng` or `fra`.
        hidden: `[T, D]`, the features of each word.
        router_weight: `[E, D]`, one row per expert.
        logits: `[T, E]`, `hidden @ router_weight.T`.
    """

    words: tuple[str, ...]
    languages: tuple[str, ...]
    hidden: Tensor
    router_weight: Tensor
    logits: Tensor


def six_words(dtype: torch.dtype = torch.float32) -> SixWords:
    """The six words in new tensors, which you may change."""
    hidden, weight = torch.tensor(_HIDDEN, dtype=dtype), torch.tensor(_ROUTER_WEIGHT, dtype=dtype)
    return SixWords(WORDS, LANGUAGES, hidden, weight, hidden @ weight.T)
