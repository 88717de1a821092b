"""Attention, its masks, and the encoder and decoder layers.

Shapes: B batch, S source length, L target length, D model width, H heads.
Module names are those of `transformers` 4.x (`models/nllb_moe/modeling_nllb_moe.py`), so state dicts map one to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_edu.config import MoEConfig
from moe_edu.kernels.attention import scaled_dot_product_attention
from moe_edu.moe.layer import apply_feed_forward, make_feed_forward
from moe_edu.moe.routing import RouterOutput, check_padding_mask

T = TypeVar("T")


class KeyValue(NamedTuple):
    """Keys and values of one attention, each `[B, H, length, D / H]`."""

    key: Tensor
    value: Tensor


class LayerCache(NamedTuple):
    """What a decoder layer remembers between generated tokens."""

    self_attention: KeyValue
    cross_attention: KeyValue


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2) with biases on all four projections.

    Args:
        config: width and dropout.
        num_heads: H, which divides D.
        name: what an error calls `num_heads`.

    Raises:
        ValueError: heads that do not divide D.
    """

    def __init__(self, config: MoEConfig, num_heads: int, name: str = "num_heads") -> None:
        super().__init__()
        if num_heads < 1 or config.d_model % num_heads:
            raise ValueError(
                f"{name} must divide d_model={config.d_model}; got {num_heads}: choose a divisor, "
                f"such as {math.gcd(config.d_model, num_heads)}"
            )
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


class EncoderLayer(nn.Module):
    """Pre-norm encoder layer: `x + dropout(attn(norm(x)))`, then `x + dropout(ffn(norm(x)))`."""

    def __init__(self, config: MoEConfig, sparse: bool) -> None:
        super().__init__()
        heads, name = config.encoder_attention_heads, "MoEConfig.encoder_attention_heads"
        self.self_attn = Attention(config, heads, name)
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
        heads, name = config.decoder_attention_heads, "MoEConfig.decoder_attention_heads"
        self.self_attn = Attention(config, heads, name)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = Attention(config, heads, name)
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
        """`hidden [B, L, D]` against `encoder_hidden [B, S, D]`; `cache` holds both for earlier tokens.

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


def clamp_overflow(hidden: Tensor) -> Tensor:
    """Bring fp16 overflow back to `finfo.max - 1000`; other dtypes pass as they are."""
    if hidden.dtype != torch.float16:
        return hidden
    limit = torch.finfo(torch.float16).max - 1000
    return hidden.clamp(-limit, limit)


def residual_dropout(config: MoEConfig) -> float:
    """Dropout on the feed-forward's residual branch."""
    return config.activation_dropout if config.activation_dropout_on_residual else config.dropout


def drop_layer(probability: float, training: bool) -> bool:
    """LayerDrop (Fan et al. 2019): skip a layer in training with this probability. Drawn on the CPU: no sync."""
    return training and probability > 0 and torch.rand(()).item() < probability


def maybe_checkpoint(enabled: bool, layer: Callable[..., T], *args: Any) -> T:
    """Run `layer`, recomputing it in backward if `enabled`."""
    if not enabled:
        return layer(*args)
    return checkpoint(layer, *args, use_reentrant=False)


def padding_from_attention_mask(attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """An attention mask (1 for words) as the router's padding mask (True where padded)."""
    if attention_mask is None:
        return None
    padding_mask = attention_mask == 0
    check_padding_mask(padding_mask, shape, "attention_mask")
    return padding_mask


def attention_bias(padding_mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """`[B, 1, 1, S]` additive mask: the lowest finite number where padded.

    Finite, so that a row of nothing but padding attends evenly instead of giving NaN.
    """
    if padding_mask is None:
        return None
    zeros = torch.zeros(padding_mask.shape, dtype=compute_dtype(hidden), device=hidden.device)
    return zeros.masked_fill(padding_mask, torch.finfo(zeros.dtype).min)[:, None, None]


def causal_bias(padding_mask: Tensor | None, hidden: Tensor, past_length: int) -> Tensor | None:
    """`[B or 1, 1, L, past + L]` additive mask: no token sees a later one, nor padding."""
    length = hidden.shape[1]
    if length == 1 and padding_mask is None:
        return None
    later = torch.ones(length, past_length + length, dtype=torch.bool, device=hidden.device)
    hide = later.triu(past_length + 1)[None, None]
    if padding_mask is not None:
        hide = hide | padding_mask[:, None, None]
    zeros = torch.zeros(hide.shape, dtype=compute_dtype(hidden), device=hidden.device)
    return zeros.masked_fill(hide, torch.finfo(zeros.dtype).min)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that attention runs in: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
