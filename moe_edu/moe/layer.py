"""The feed-forward networks of a layer: the dense one, and the sparse one that routes each token to experts.

Shapes: B batch, S sequence, T = B * S tokens, K choices per token, D model width, F feed-forward width.
Module names are those of `transformers` 4.x (`models/nllb_moe/modeling_nllb_moe.py`), so state dicts map one to one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_edu.config import MoEConfig
from moe_edu.moe.dispatch import permute, plan_dispatch, unpermute
from moe_edu.moe.experts import ACTIVATIONS, Backend, Experts
from moe_edu.moe.routing import Gating, RouterOutput, Top2Router

Model = TypeVar("Model", bound=nn.Module)
# Applies expert output masking to rows `[N, D]` and gates `[T, K]`.
Mask = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Mixing = Callable[[Tensor, RouterOutput, Experts, Mask], Tensor]


class FeedForward(nn.Module):
    """The dense feed-forward network: `fc2(dropout(act(fc1(x))))`."""

    def __init__(self, config: MoEConfig, ffn_dim: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.act(self.fc1(hidden))))


class SparseMLP(nn.Module):
    """The sparse feed-forward network: route, dispatch, compute, combine.

    Args:
        config: sizes and router settings.
        ffn_dim: width F of each expert; None for `config.encoder_ffn_dim`.
        backend: how the experts' products are computed, see `Experts`.

    Attributes:
        mixing: `dispatch_and_combine`, or a function with the same arguments and result; see `with_parts`.
    """

    def __init__(self, config: MoEConfig, ffn_dim: int | None = None, backend: Backend = "auto") -> None:
        super().__init__()
        self.config = config
        self.router = Top2Router(config)
        self.experts = Experts(config, ffn_dim, backend)
        self.mixing: Mixing = dispatch_and_combine

    def forward(
        self, hidden: Tensor, padding_mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, RouterOutput]:
        """Return the mixed outputs `[B, S, D]` and the routing.

        A token that no expert took has an output of zeros.

        Args:
            hidden: `[B, S, D]`.
            padding_mask: `[B, S]` bool, True where padded.
            generator: draws the random numbers of the router's sampling and of the expert output masking.

        Raises:
            ValueError: `hidden` or the mask has another shape or dtype.
        """
        routing = self.router(hidden, padding_mask, generator)
        mask = partial(self._mask_outputs, generator)
        mixed = self.mixing(hidden.flatten(0, 1), routing, self.experts, mask)
        return mixed.view(hidden.shape).to(hidden.dtype), routing

    def _mask_outputs(
        self, generator: torch.Generator | None, rows: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Expert output masking (NLLB Team 2022, section 6.2.2), as a mask on the gates `[T, K]`."""
        p = self.config.moe_token_dropout
        if p == 0:
            return rows, weights
        if not self.training:
            return rows, weights * (1 - p)
        if self.config.elementwise_token_dropout:
            return F.dropout(rows, p), weights
        # Not `torch.rand`, which torch.compile cannot trace with a generator argument where T is not fixed.
        uniform = torch.empty_like(weights, dtype=torch.float32).uniform_(generator=generator)
        return rows, weights * (uniform >= p)


def dispatch_and_combine(hidden: Tensor, routing: RouterOutput, experts: Experts, mask: Mask) -> Tensor:
    """The experts' outputs for `hidden [T, D]`, weighted by their masked gates: `[T, D]`."""
    plan = plan_dispatch(routing)
    rows = experts(permute(hidden, plan), plan.counts, routing.capacity)
    rows, gates = mask(rows, routing.combine_weights)
    return unpermute(rows, gates, plan)


def with_parts(model: Model, gating: Gating, mixing: Mixing) -> Model:
    """A copy of `model`, its weights included, whose sparse layers run these two functions.

    Args:
        gating: replaces `top2_gating`.
        mixing: replaces `dispatch_and_combine`.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, SparseMLP):
            module.router.gating, module.mixing = gating, mixing
    return copied


def make_feed_forward(config: MoEConfig, ffn_dim: int, sparse: bool) -> nn.Module:
    return SparseMLP(config, ffn_dim) if sparse else FeedForward(config, ffn_dim)


def apply_feed_forward(
    ffn: nn.Module, hidden: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, RouterOutput | None]:
    """Run a dense or a sparse feed-forward network; a dense one returns None as its routing."""
    if isinstance(ffn, SparseMLP):
        return ffn(hidden, padding_mask)
    return ffn(hidden), None
