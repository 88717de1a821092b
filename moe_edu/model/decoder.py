"""The decoder: causal self-attention, cross-attention to the encoded source, and layers of which some have experts.

Shapes: B batch, S source length, L target length, D model width, H heads, V vocabulary.
Source: NLLB Team 2022, section 6; the computation is that of `transformers` 4.x `NllbMoeDecoder`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from moe_edu.config import MoEConfig
from moe_edu.kernels.vocabulary import MostProbable, most_probable
from moe_edu.model.embedding import PositionTable, embed
from moe_edu.model.layers import (
    DecoderLayer,
    LayerCache,
    attention_bias,
    causal_bias,
    drop_layer,
    maybe_checkpoint,
    padding_from_attention_mask,
)
from moe_edu.moe.routing import RouterOutput


class DecoderOutput(NamedTuple):
    """What the decoder returns: as `EncoderOutput`, and the cache for the next token (None where not asked for)."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor | None, ...] | None
    routing: tuple[RouterOutput | None, ...]
    cache: tuple[LayerCache, ...] | None


class MoEDecoder(nn.Module):
    """The decoder: causal self-attention, cross-attention, and every `decoder_sparse_step`-th layer with experts.

    Its embedding is its output layer, too: `logits` and `most_probable` make the next token from a hidden state.
    """

    def __init__(self, config: MoEConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embed_tokens
        self.embed_positions = PositionTable(
            config.max_position_embeddings, config.d_model, config.pad_token_id
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, config.is_sparse(i, config.decoder_sparse_step))
            for i in range(config.decoder_layers)
        )
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: tuple[LayerCache, ...] | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Decode `input_ids [B, L]` against `encoder_hidden [B, S, D]`.

        With a `cache`, `input_ids` holds only the tokens after those cached, and no `attention_mask` is taken; each
        source may then serve several rows in turn, as the beams of a sentence share one: `[B * W, L]`.

        Raises:
            ValueError: rows that do not match the sources, a mask together with a cache, or a cache without layers.
        """
        config = self.config
        rows, sources = len(input_ids), len(encoder_hidden)
        if rows != sources and (cache is None or rows % sources):
            raise ValueError(f"{rows} rows of decoder ids for {sources} sources: give each source its own")
        if cache is not None and not cache:
            raise ValueError("a decoder without layers keeps no cache: decode without one")
        if cache is not None and attention_mask is not None:
            raise ValueError("attention_mask cannot be combined with a cache: decode unpadded prefixes")
        past_length = 0 if cache is None else cache[0].self_attention.key.shape[2]
        hidden, words = embed(self.embed_tokens, input_ids, None, config)
        hidden = F.dropout(hidden + self.embed_positions(words, past_length), config.dropout, self.training)
        padding_mask = padding_from_attention_mask(attention_mask, words.shape)
        self_bias = causal_bias(padding_mask, hidden, past_length)
        source_padding = padding_from_attention_mask(encoder_attention_mask, encoder_hidden.shape[:2])
        cross_bias = attention_bias(source_padding, hidden)

        hidden_states, attentions, routing, new_cache = [], [], [], []
        for i, layer in enumerate(self.layers):
            hidden_states.append(hidden)
            weights, layer_routing = None, None
            if use_cache or not drop_layer(config.decoder_layerdrop, self.training):
                hidden, layer_cache, weights, layer_routing = maybe_checkpoint(
                    config.gradient_checkpointing and self.training,
                    layer,
                    hidden,
                    encoder_hidden,
                    None if cache is None else cache[i],
                    self_bias,
                    cross_bias,
                    padding_mask,
                    output_attentions,
                )
                new_cache.append(layer_cache)
            attentions.append(weights)
            routing.append(layer_routing)
        last = self.layer_norm(hidden)
        return DecoderOutput(
            last,
            (*hidden_states, last) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
            tuple(routing),
            tuple(new_cache) if use_cache else None,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The last hidden states `[..., D]` to logits `[..., V]`."""
        return F.linear(hidden, self.embed_tokens.weight)

    def most_probable(self, hidden: Tensor, k: int) -> MostProbable:
        """The k most probable next tokens after each of the last hidden states `[N, D]`, without a gradient."""
        return most_probable(hidden, self.embed_tokens.weight, k)
