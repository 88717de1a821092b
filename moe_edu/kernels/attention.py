"""Scaled dot-product attention on whichever code is fastest for it.

Shapes: B sentences, H heads, L queries, S keys, D numbers of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.kernels.compiled import call, can_be_compiled

# `csrc/attention.c` holds so many keys and so many numbers of a head; beyond so many queries PyTorch is as fast.
_MOST_KEYS, _LARGEST_HEAD, _FEW_QUERIES = 1024, 256, 8


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """`softmax(query @ key^T / sqrt(D) + bias) @ value`, as PyTorch's function of this name.

    Generation asks for one query a hypothesis: so few are left to compiled code where no gradient is needed.

    Args:
        query: `[B, H, L, D]`.
        key, value: `[B, H, S, D]`.
        bias: broadcasts to `[B, H, L, S]`; None for none.
        dropout: of the weights.
    """
    if dropout > 0 or torch.is_grad_enabled() or not _can_be_compiled(query, key, value, bias):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    B, H, L, D = query.shape
    S = key.shape[2]
    mixed = query.new_empty(B, L, H, D).transpose(1, 2)
    bias = None if bias is None else bias.expand(B, H, L, S)
    tensors = (query, key, value, bias, mixed)
    strides = [None if tensor is None else tensor.stride()[:3] for tensor in tensors]
    call("attention", *tensors, *strides, B, H, L, S, D)
    return mixed


def _can_be_compiled(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    """Whether these are few queries, and what compiled code may touch: it checks nothing."""
    tensors = (query, key, value) if bias is None else (query, key, value, bias)
    # torch.compile has no need of it, and would have to leave its graph.
    if torch.compiler.is_compiling() or not can_be_compiled(*tensors) or any(t.ndim != 4 for t in tensors):
        return False
    B, H, L, D = query.shape
    S = key.shape[2]
    return (
        L <= _FEW_QUERIES
        and 0 < S <= _MOST_KEYS
        and D <= _LARGEST_HEAD
        and key.shape == value.shape == (B, H, S, D)
        # The last dimension is read as one run of memory.
        and all(D == 1 or tensor.stride(3) == 1 for tensor in (query, key, value))
        and (bias is None or _is_mask_for(bias, (B, H, L, S)))
    )


def _is_mask_for(bias: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether `bias` broadcasts to `shape` and has one number a key, next to each other."""
    broadcasts = all(size in (1, full) for size, full in zip(bias.shape, shape, strict=True))
    return broadcasts and bias.shape[3] == shape[3] and (shape[3] == 1 or bias.stride(3) == 1)
