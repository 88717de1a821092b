"""The most probable tokens of a large vocabulary.

Shapes: N rows, D model width, V vocabulary, k tokens to find.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.kernels.compiled import call, can_be_compiled

# On the CPU so many logits are made at once: they stay in its cache for the softmax and the choice of the best.
_LOGITS_AT_ONCE = 2**18
# Compiled code sorts what it has found by insertion, which suits a few.
_FEW_TOKENS = 64


class MostProbable(NamedTuple):
    """The k most probable tokens of each row, best first: their log-probabilities and ids, `[N, k]` each."""

    log_probs: Tensor
    tokens: Tensor


@torch.no_grad()
def most_probable(hidden: Tensor, weight: Tensor, k: int) -> MostProbable:
    """The largest k of `log_softmax(hidden @ weight.T)`, for `hidden [N, D]` and `weight [V, D]`.

    On the CPU compiled code does it without writing the logits, see `csrc/vocabulary.c`. Probabilities are fp32.
    """
    if not _can_be_compiled(hidden, weight, k):
        parts = hidden.split(_LOGITS_AT_ONCE // len(weight) + 1) if hidden.device.type == "cpu" else [hidden]
        best = [F.linear(part, weight).float().log_softmax(-1).topk(k) for part in parts]
        return MostProbable(
            torch.cat([log_probs for log_probs, _ in best]), torch.cat([tokens for _, tokens in best])
        )
    (N, D), V = hidden.shape, len(weight)
    found = MostProbable(hidden.new_empty(N, k), hidden.new_empty(N, k, dtype=torch.long))
    call("most_probable", hidden.contiguous(), weight, *found, N, V, D, k)
    return found


def _can_be_compiled(hidden: Tensor, weight: Tensor, k: int) -> bool:
    """Whether these are what compiled code may touch: it checks nothing, and PyTorch says what is wrong."""
    return (
        can_be_compiled(hidden, weight)
        and not torch.is_autocast_enabled("cpu")
        and hidden.ndim == weight.ndim == 2
        and hidden.shape[1] == weight.shape[1]
        and 0 < k <= min(len(weight), _FEW_TOKENS)
        and weight.is_contiguous()
    )
