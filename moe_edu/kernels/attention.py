"""Scaled dot-product attention, computed by whichever code is fastest for the case.

Shapes: B sentences, H heads, L queries, S keys, D numbers per head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.kernels.compiled import call, can_be_compiled, define_operator, has_tangent

# `csrc/attention.c` has room for this many keys and numbers per head; beyond this many queries PyTorch is as fast.
_MOST_KEYS, _LARGEST_HEAD, _FEW_QUERIES = 1024, 256, 8


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """`softmax(query @ key^T / sqrt(D) + bias) @ value`, like PyTorch's function of the same name.

    Generation has one query per hypothesis: compiled code computes few queries where no gradient is needed.

    Args:
        query: `[B, H, L, D]`.
        key, value: `[B, H, S, D]`.
        bias: broadcasts to `[B, H, L, S]`; None for no bias.
        dropout: probability of dropping each attention weight.
    """
    if (
        dropout > 0
        or torch.is_grad_enabled()
        or query.ndim != 4
        or query.shape[2] > _FEW_QUERIES
        or key.shape[:2] != query.shape[:2]  # PyTorch broadcasts them
        or not can_be_compiled(query, key, value)
        or has_tangent(query, key, value)
        or (bias is not None and has_tangent(bias))
    ):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    return _attention(query, key, value, bias)


def _can_be_compiled(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    """Whether compiled code may read these tensors; it checks nothing itself."""
    tensors = (query, key, value) if bias is None else (query, key, value, bias)
    if not can_be_compiled(*tensors) or any(t.ndim != 4 for t in tensors):
        return False
    B, H, L, D = query.shape
    S = key.shape[2]
    return (
        0 < S <= _MOST_KEYS
        and D <= _LARGEST_HEAD
        and key.shape == value.shape == (B, H, S, D)
        # The last dimension is read as contiguous memory.
        and all(D == 1 or tensor.stride(3) == 1 for tensor in (query, key, value))
        and (bias is None or _is_mask_for(bias, (B, H, L, S)))
    )


def _is_mask_for(bias: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether `bias` broadcasts to `shape` and holds one number per key, contiguous in memory."""
    broadcasts = all(size in (1, full) for size, full in zip(bias.shape, shape, strict=True))
    return broadcasts and bias.shape[3] == shape[3] and (shape[3] == 1 or bias.stride(3) == 1)


def _run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    if not _can_be_compiled(query, key, value, bias):  # PyTorch computes it, or says what is wrong
        return _make_result(query, key, value).copy_(
            F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        )
    B, H, L, D = query.shape
    S = key.shape[2]
    mixed = _make_result(query, key, value)
    bias = None if bias is None else bias.expand(B, H, L, S)
    tensors = (query, key, value, bias, mixed)
    strides = [None if tensor is None else tensor.stride()[:3] for tensor in tensors]
    call("attention", *tensors, *strides, B, H, L, S, D)
    return mixed


def _make_result(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """An uninitialised `[B, H, L, D]`, with the heads of each token side by side in memory."""
    B, H, L, _ = query.shape
    return query.new_empty(B, L, H, value.shape[3]).transpose(1, 2)


def _count_flops(query_shape: Sequence[int], key_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Two FLOPs per multiplication, for the scores and again for the weighted sum."""
    return 4 * math.prod(query_shape) * key_shape[2]


_attention = define_operator(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? bias) -> Tensor",
    _run,
    fake=_make_result,
    flops=_count_flops,
)
