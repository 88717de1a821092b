"""The most probable tokens of a large vocabulary.

Shapes: N rows, D model width, V vocabulary size, k tokens to find per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.kernels.compiled import call, can_be_compiled, define_operator, has_tangent

# The CPU computes this many logits at once: they stay in its cache for the softmax and the selection of the best.
_LOGITS_AT_ONCE = 2**18
# Compiled code keeps the best tokens sorted by insertion, which is fast for up to this many.
_FEW_TOKENS = 64


class MostProbable(NamedTuple):
    """The k most probable tokens of each row, best first: their log-probabilities and ids, `[N, k]` each."""

    log_probs: Tensor
    tokens: Tensor


@torch.no_grad()
def most_probable(hidden: Tensor, weight: Tensor, k: int) -> MostProbable:
    """The k largest entries of `log_softmax(hidden @ weight.T)`, for `hidden [N, D]` and `weight [V, D]`.

    On the CPU, compiled code finds them without storing all logits, see `csrc/vocabulary.c`. Probabilities are fp32.
    """
    if torch.is_autocast_enabled("cpu") or not can_be_compiled(hidden, weight) or has_tangent(hidden, weight):
        return MostProbable(*_by_pytorch(hidden, weight, k))
    return MostProbable(*_most_probable(hidden, weight, k))


def _by_pytorch(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    parts = hidden.split(_LOGITS_AT_ONCE // len(weight) + 1) if hidden.device.type == "cpu" else [hidden]
    best = [F.linear(part, weight).float().log_softmax(-1).topk(k) for part in parts]
    return torch.cat([log_probs for log_probs, _ in best]), torch.cat([tokens for _, tokens in best])


def _can_be_compiled(hidden: Tensor, weight: Tensor, k: int) -> bool:
    """Whether compiled code may touch these tensors; it checks nothing itself."""
    return (
        can_be_compiled(hidden, weight)
        and hidden.ndim == weight.ndim == 2
        and hidden.shape[1] == weight.shape[1]
        and 0 < k <= min(len(weight), _FEW_TOKENS)
        and weight.is_contiguous()
    )


def _run(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if not _can_be_compiled(hidden, weight, k):  # PyTorch computes it, or says what is wrong
        return _by_pytorch(hidden, weight, k)
    log_probs, tokens = found = _make_results(hidden, weight, k)
    call("most_probable", hidden.contiguous(), weight, log_probs, tokens, len(hidden), *weight.shape, k)
    return found


def _make_results(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    N = hidden.shape[0]
    return hidden.new_empty(N, k), hidden.new_empty(N, k, dtype=torch.long)


def _count_flops(hidden_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Two FLOPs per multiplication; the softmax is not counted, here as elsewhere."""
    return 2 * hidden_shape[0] * math.prod(weight_shape)


_most_probable = define_operator(
    "most_probable(Tensor hidden, Tensor weight, int k) -> (Tensor, Tensor)",
    _run,
    fake=_make_results,
    flops=_count_flops,
)
