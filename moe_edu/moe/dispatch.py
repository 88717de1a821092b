"""Dispatch and combine: send each kept choice's row to its expert, and bring the results back to the tokens.

Shapes: T tokens, K choices per token, E experts, C slots per expert, D model width, N = T * K rows.

                 order, sorted by expert            counts
    choices  t0:e1 t0:e0 t1:e1 t1:dropped    ->    e0  e1
    rows     [ t0 | t0 t1 | (t1) ]                  1   2      the dropped row comes last and belongs to no expert

Rows are sorted instead of multiplied by a one-hot `[T, E, C]` tensor, so memory grows with `K * T * D`, not with E
(MegaBlocks, Gale et al. 2022, section 4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_edu.moe.routing import RouterOutput, count_per_expert


class DispatchPlan(NamedTuple):
    """Where each row goes, and how to find it again.

    Attributes:
        order: `[N]` int64; the flat choice `t * K + k` that each row belongs to. Rows are sorted by expert and,
            within an expert, by token; rows of choices that were not kept come last.
        row: `[N]` int64; the inverse of `order`: the row of each flat choice.
        counts: `[E]` int64; the number of rows per expert. Their sum is the number of kept choices.
        choices: K.
    """

    order: Tensor
    row: Tensor
    counts: Tensor
    choices: int


def plan_dispatch(routing: RouterOutput) -> DispatchPlan:
    """Sort the kept choices of `routing` by expert, without synchronising with the device."""
    E = routing.num_experts
    expert = routing.expert_index.where(routing.kept, E).reshape(-1)  # [N], E for "no expert"
    order = expert.argsort(stable=True)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = count_per_expert(routing.expert_index.where(routing.kept, -1), E)
    return DispatchPlan(order, row, counts, routing.expert_index.shape[1])


def permute(hidden: Tensor, plan: DispatchPlan) -> Tensor:
    """`[T, D]` tokens to `[N, D]` rows sorted by expert; each token appears once per choice."""
    return hidden.index_select(0, plan.order // plan.choices)


def unpermute(rows: Tensor, combine_weights: Tensor, plan: DispatchPlan) -> Tensor:
    """Bring `[N, D]` expert outputs back to their tokens, mixed by the gates `[T, K]`: `[T, D]`.

    Rows of choices that were not kept must be finite; their gates are 0.
    """
    T, K = combine_weights.shape
    per_choice = rows.index_select(0, plan.row).unflatten(0, (T, K))
    return torch.einsum("tk,tkd->td", combine_weights.to(rows.dtype), per_choice)


def dense_dispatch(hidden: Tensor, dispatch_mask: Tensor) -> Tensor:
    """GShard's form, for teaching: a `[T, E, C]` mask brings `[T, D]` tokens to `[E, C, D]` slots."""
    return torch.einsum("tec,td->ecd", dispatch_mask.to(hidden.dtype), hidden)


def dense_combine(slots: Tensor, dispatch_mask: Tensor, combine_matrix: Tensor) -> Tensor:
    """GShard's form, for teaching: the mask brings `[E, C, D]` slots back, weighted by `[T, E]`: `[T, D]`."""
    weights = dispatch_mask.to(slots.dtype) * combine_matrix.to(slots.dtype)[:, :, None]
    return torch.einsum("tec,ecd->td", weights, slots)
