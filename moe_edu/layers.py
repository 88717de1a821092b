"""The layers: attention, the dense and the sparse feed-forward, and the encoder and decoder layers made of them.

Shapes: B batch, S source length, L target length, D model width, H heads, T = B * S tokens.
Module names are those of `transformers` 4.x (`models/nllb_moe/modeling_nllb_moe.py`), so state dicts map one to one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_edu.attention import scaled_dot_product_attention
from moe_edu.backends import Backend
from moe_edu.config import MoEConfig
from moe_edu.dispatch import permute, plan_dispatch, unpermute
from moe_edu.experts import ACTIVATIONS, Experts
from moe_edu.routing import RouterOutput, Top2Router


class KeyValue(NamedTuple):
    """Keys and values of one attention, each `[B, H, length, D / H]`."""

    key: Tensor
    value: Tensor


class LayerCache(NamedTuple):
    """What a decoder layer remembers between generated tokens."""

    self_attention: KeyValue
    cross_attention: KeyValue


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2) with biases on all four projections."""

    def __init__(self, config: MoEConfig, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def project(self, states: Tensor) -> KeyValue:
        """The keys and values of `states [B, S, D]`."""
        return KeyValue(self._split(self.k_proj(states)), self._split(self.v_proj(states)))

    def forward(
        self,
        hidden: Tensor,
        memory: KeyValue,
        bias: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `hidden [B, L, D]` to `memory`.

        Args:
            bias: additive mask that broadcasts to `[B, H, L, S]`.
            head_mask: `[H]`, multiplies each head's weights.
            output_weights: also return the weights `[B, H, L, S]`.
        """
        query = self._split(self.q_proj(hidden))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if head_mask is None and not output_weights:
            mixed = scaled_dot_product_attention(query, *memory, bias, dropout)
        else:
            scores = query @ memory.key.mT * query.shape[-1] ** -0.5
            weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
            if head_mask is not None:
                weights = weights * head_mask.view(-1, 1, 1)
            weights = F.dropout(weights, dropout, self.training)
            mixed = weights @ memory.value
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


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
    """The sparse feed-forward network: route, dispatch, multiply, combine.

    Args:
        config: sizes and router settings.
        ffn_dim: width F of each expert; None for `config.encoder_ffn_dim`.
        backend: how the experts' products are computed, see `Experts`.
    """

    def __init__(self, config: MoEConfig, ffn_dim: int | None = None, backend: Backend = "auto") -> None:
        super().__init__()
        self.config = config
        self.router = Top2Router(config)
        self.experts = Experts(config, ffn_dim, backend)

    def forward(
        self, hidden: Tensor, padding_mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, RouterOutput]:
        """`hidden [B, S, D]`, `padding_mask [B, S]` bool (True where padded): the mixed outputs and the routing.

        A token that no expert took comes back as zeros. `generator` feeds the router's sampling and the expert
        output masking.

        Raises:
            ValueError: a mask of another shape or dtype.
        """
        routing = self.router(hidden, padding_mask, generator)
        plan = plan_dispatch(routing)
        rows = self.experts(permute(hidden.flatten(0, 1), plan), plan.counts, routing.capacity)
        rows, weights = self._mask_outputs(rows, routing.combine_weights, generator)
        return unpermute(rows, weights, plan).view(hidden.shape).to(hidden.dtype), routing

    def _mask_outputs(
        self, rows: Tensor, weights: Tensor, generator: torch.Generator | None
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


def apply_feed_forward(
    ffn: nn.Module, hidden: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, RouterOutput | None]:
    """Run a dense or a sparse feed-forward network; the routing is None where it is dense."""
    if isinstance(ffn, SparseMLP):
        return ffn(hidden, padding_mask)
    return ffn(hidden), None


def clamp_overflow(hidden: Tensor) -> Tensor:
    """Bring fp16 overflow back to `finfo.max - 1000`; other dtypes pass as they are."""
    if hidden.dtype != torch.float16:
        return hidden
    limit = torch.finfo(torch.float16).max - 1000
    return hidden.clamp(-limit, limit)


class EncoderLayer(nn.Module):
    """Pre-norm encoder layer: `x + dropout(attn(norm(x)))`, then `x + dropout(ffn(norm(x)))`."""

    def __init__(self, config: MoEConfig, sparse: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.ffn = make_feed_forward(config, config.encoder_ffn_dim, sparse)
        self.ff_layer_norm = nn.LayerNorm(config.d_model)
        self.ff_dropout = nn.Dropout(residual_dropout(config))

    def forward(
        self,
        hidden: Tensor,
        attention_bias: Tensor | None = None,
        padding_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, RouterOutput | None]:
        """`hidden [B, S, D]` to (hidden, attention weights or None, routing or None)."""
        normed = self.self_attn_layer_norm(hidden)
        attended, weights = self.self_attn(
            normed, self.self_attn.project(normed), attention_bias, head_mask, output_attentions
        )
        hidden = hidden + self.attn_dropout(attended)
        update, routing = apply_feed_forward(self.ffn, self.ff_layer_norm(hidden), padding_mask)
        return clamp_overflow(hidden + self.ff_dropout(update)), weights, routing


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer: causal self-attention, cross-attention, feed-forward."""

    def __init__(self, config: MoEConfig, sparse: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.decoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = Attention(config, config.decoder_attention_heads)
        self.cross_attention_layer_norm = nn.LayerNorm(config.d_model)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.ffn = make_feed_forward(config, config.decoder_ffn_dim, sparse)
        self.ff_layer_norm = nn.LayerNorm(config.d_model)
        self.ff_dropout = nn.Dropout(residual_dropout(config))

    def forward(
        self,
        hidden: Tensor,
        encoder_hidden: Tensor,
        cache: LayerCache | None = None,
        self_bias: Tensor | None = None,
        cross_bias: Tensor | None = None,
        padding_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, LayerCache, Tensor | None, RouterOutput | None]:
        """`hidden [B, L, D]` against `encoder_hidden [B, S, D]`; `cache` remembers both for the tokens before.

        A source may serve several rows of `hidden` in turn, as the beams of a sentence share one: `[B * W, L, D]`.

        Returns:
            (hidden, cache that includes these tokens, self-attention weights or None, routing or None)
        """
        normed = self.self_attn_layer_norm(hidden)
        memory = self.self_attn.project(normed)
        if cache is not None:
            past = cache.self_attention
            memory = KeyValue(*(torch.cat(pair, dim=2) for pair in zip(past, memory, strict=True)))
        attended, weights = self.self_attn(normed, memory, self_bias, None, output_attentions)
        hidden = hidden + self.attn_dropout(attended)
        cross = self.cross_attention.project(encoder_hidden) if cache is None else cache.cross_attention
        queries = self.cross_attention_layer_norm(hidden)
        if len(cross.key) != len(queries):
            queries = queries.view(len(cross.key), -1, queries.shape[2])
        attended, _ = self.cross_attention(queries, cross, cross_bias)
        hidden = hidden + self.attn_dropout(attended.view_as(hidden))
        update, routing = apply_feed_forward(self.ffn, self.ff_layer_norm(hidden), padding_mask)
        hidden = clamp_overflow(hidden + self.ff_dropout(update))
        return hidden, LayerCache(memory, cross), weights, routing


def make_feed_forward(config: MoEConfig, ffn_dim: int, sparse: bool) -> nn.Module:
    return SparseMLP(config, ffn_dim) if sparse else FeedForward(config, ffn_dim)


def residual_dropout(config: MoEConfig) -> float:
    """Dropout on the feed-forward's residual branch."""
    return config.activation_dropout if config.activation_dropout_on_residual else config.dropout
