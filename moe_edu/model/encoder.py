"""The encoder: embeddings, positions, layers of which some have experts, and a final layer norm.

Shapes: B batch, S source length, D model width, H heads.
Source: NLLB Team 2022, section 6; the computation is that of `transformers` 4.x `NllbMoeEncoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from moe_edu.config import MoEConfig
from moe_edu.model.checkpoint import hf_state_dict, load_hf_state_dict
from moe_edu.model.embedding import PositionTable, embed, initialize, make_embedding
from moe_edu.model.layers import (
    EncoderLayer,
    attention_bias,
    drop_layer,
    maybe_checkpoint,
    padding_from_attention_mask,
)
from moe_edu.moe.routing import RouterOutput


class EncoderOutput(NamedTuple):
    """What the encoder returns.

    Attributes:
        last_hidden_state: `[B, S, D]`, after the final layer norm.
        hidden_states: the input of each layer and the last hidden state, or None where not asked for.
        attentions: `[B, H, S, S]` per layer (None for a layer that LayerDrop skipped), or None where not asked for.
        routing: one RouterOutput per layer; None for a dense layer or one that LayerDrop skipped.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor | None, ...] | None
    routing: tuple[RouterOutput | None, ...]


class MoEEncoder(nn.Module):
    """The sparse encoder: embeddings, positions, `encoder_layers` layers of which every
    `encoder_sparse_step`-th has experts, and a final layer norm.

    Args:
        config: sizes and behaviour.
        embed_tokens: an embedding to share; None makes one.
    """

    def __init__(self, config: MoEConfig, embed_tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        self.config = config
        shared = embed_tokens is not None
        self.embed_tokens = embed_tokens if embed_tokens is not None else make_embedding(config)
        self.embed_positions = PositionTable(
            config.max_position_embeddings, config.d_model, config.pad_token_id
        )
        self.layers = nn.ModuleList(
            EncoderLayer(config, config.is_sparse(i, config.encoder_sparse_step))
            for i in range(config.encoder_layers)
        )
        self.layer_norm = nn.LayerNorm(config.d_model)
        if not shared:
            initialize(self, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Encode a batch.

        Args:
            input_ids: `[B, S]` int64; or give `inputs_embeds`.
            attention_mask: `[B, S]`, 1 (or True) for words, 0 for padding; None where nothing is padded.
            inputs_embeds: `[B, S, D]` in place of ids; positions then count every place.
            head_mask: `[layers, heads]`, multiplies each head's attention weights.
            output_attentions: also return the attention weights.
            output_hidden_states: also return each layer's input.

        Raises:
            ValueError: both or neither of ids and embeddings, a mask of the wrong shape, more tokens than positions.
        """
        config = self.config
        hidden, words = embed(self.embed_tokens, input_ids, inputs_embeds, config)
        hidden = F.dropout(hidden + self.embed_positions(words), config.dropout, self.training)
        padding_mask = padding_from_attention_mask(attention_mask, words.shape)
        bias = attention_bias(padding_mask, hidden)
        if head_mask is not None and head_mask.shape[0] != len(self.layers):
            raise ValueError(
                f"head_mask must be [{len(self.layers)} layers, heads]; got {list(head_mask.shape)}"
            )

        hidden_states, attentions, routing = [], [], []
        for i, layer in enumerate(self.layers):
            hidden_states.append(hidden)
            weights, layer_routing = None, None
            if not drop_layer(config.encoder_layerdrop, self.training):
                hidden, weights, layer_routing = maybe_checkpoint(
                    config.gradient_checkpointing and self.training,
                    layer,
                    hidden,
                    bias,
                    padding_mask,
                    None if head_mask is None else head_mask[i],
                    output_attentions,
                )
            attentions.append(weights)
            routing.append(layer_routing)
        last = self.layer_norm(hidden)
        return EncoderOutput(
            last,
            (*hidden_states, last) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
            tuple(routing),
        )

    def load_hf_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy in a Hugging Face NLLB-MoE encoder, alone or inside a whole model's state dict."""
        load_hf_state_dict(self, state_dict)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under `NllbMoeEncoder`'s names; the tensors share memory with the model."""
        return hf_state_dict(self)
