"""The models: `MoEEncoder`, and `MoETranslator`, which adds the decoder and the vocabulary.

Shapes: B batch, S source length, L target length, D model width, V vocabulary.
Source: NLLB Team 2022, section 6; the computation is that of `transformers` 4.x `NllbMoeForConditionalGeneration`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_edu.checkpoint import hf_state_dict, load_hf_state_dict
from moe_edu.config import MoEConfig
from moe_edu.generation import generate
from moe_edu.layers import DecoderLayer, EncoderLayer, LayerCache
from moe_edu.routing import RouterOutput

T = TypeVar("T")


class EncoderOutput(NamedTuple):
    """What the encoder returns.

    Attributes:
        last_hidden_state: `[B, S, D]`, after the final layer norm.
        hidden_states: the input of each layer and the last hidden state, or None where not asked for.
        attentions: `[B, H, S, S]` a layer (None for a layer that LayerDrop skipped), or None where not asked for.
        routing: one RouterOutput a layer; None for a dense layer or one that LayerDrop skipped.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor | None, ...] | None
    routing: tuple[RouterOutput | None, ...]


class DecoderOutput(NamedTuple):
    """What the decoder returns: as `EncoderOutput`, and the cache for the next token (None where not asked for)."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor | None, ...] | None
    routing: tuple[RouterOutput | None, ...]
    cache: tuple[LayerCache, ...] | None


class TranslatorOutput(NamedTuple):
    """Logits `[B, L, V]` and what the two halves returned."""

    logits: Tensor
    encoder: EncoderOutput
    decoder: DecoderOutput

    @property
    def routing(self) -> tuple[RouterOutput | None, ...]:
        """One entry a layer, the encoder's first."""
        return self.encoder.routing + self.decoder.routing


class PositionTable(nn.Module):
    """Sinusoidal positions counted from `padding_idx + 1` over real tokens; padding gets zeros.

    Source: tensor2tensor's form of Vaswani et al. 2017, section 3.5: all sines, then all cosines.
    """

    table: Tensor

    def __init__(self, num_positions: int, d_model: int, padding_idx: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        self.padding_idx = padding_idx
        half = d_model // 2
        rates = torch.exp(torch.arange(half) * (-math.log(10000) / max(half - 1, 1)))
        angles = torch.arange(num_positions + padding_idx + 1)[:, None] * rates
        table = F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, d_model % 2))
        table[padding_idx] = 0
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, words: Tensor, start: int = 0) -> Tensor:
        """`words [B, S]` bool, True for real tokens; `start` tokens came before: `[B, S, D]`.

        Raises:
            ValueError: more tokens than the model has positions.
        """
        length = start + words.shape[1]
        if length > self.num_positions:
            raise ValueError(
                f"{length} tokens are more than the model's {self.num_positions} positions: "
                "shorten the text or raise config.max_position_embeddings"
            )
        index = (words.long().cumsum(dim=1) + start) * words + self.padding_idx
        return self.table[index]


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


class MoEDecoder(nn.Module):
    """The decoder: causal self-attention, cross-attention, and every `decoder_sparse_step`-th layer with experts."""

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
            ValueError: rows that do not match the sources, a mask beside a cache, or the cache of no layers.
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


class MoETranslator(nn.Module):
    """Encoder, decoder and one embedding that both share with the output layer."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = make_embedding(config)
        self.encoder = MoEEncoder(config, self.shared)
        self.decoder = MoEDecoder(config, self.shared)
        initialize(self, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        encoder_output: EncoderOutput | None = None,
        cache: tuple[LayerCache, ...] | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> TranslatorOutput:
        """Teacher-forced logits `[B, L, V]`.

        Args:
            input_ids: `[B, S]` source ids; not needed with `encoder_output`.
            attention_mask: `[B, S]`, 1 for words; also needed with `encoder_output` where the source is padded.
            decoder_input_ids: `[B, L]`, the target shifted right behind `config.decoder_start_token_id`.
            decoder_attention_mask: `[B, L]`, 1 for words.
            encoder_output: an encoding to reuse.
            cache: what an earlier call with `use_cache=True` returned in `decoder.cache`.

        Raises:
            ValueError: no decoder ids, a mask of the wrong shape, more tokens than positions.
        """
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids are required: the target shifted right, or use generate()")
        if encoder_output is None:
            encoder_output = self.encoder(
                input_ids,
                attention_mask,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
            )
        decoded = self.decoder(
            decoder_input_ids,
            encoder_output.last_hidden_state,
            attention_mask,
            decoder_attention_mask,
            cache,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        return TranslatorOutput(self.vocabulary_logits(decoded.last_hidden_state), encoder_output, decoded)

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """The decoder's hidden states `[..., D]` to logits `[..., V]`, with the embedding as output layer."""
        return F.linear(hidden, self.shared.weight)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Translate by greedy or beam search; see `moe_edu.generation.generate` for the options."""
        return generate(self, input_ids, attention_mask, **options)

    def load_hf_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy in the state dict of `NllbMoeForConditionalGeneration` or `NllbMoeModel`."""
        load_hf_state_dict(self, state_dict)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under `NllbMoeForConditionalGeneration`'s names, sharing memory with the model."""
        return hf_state_dict(self)


def make_embedding(config: MoEConfig) -> nn.Embedding:
    return nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)


def initialize(model: nn.Module, config: MoEConfig) -> None:
    """Normal weights of standard deviation `init_std`, zero biases and padding row, as `transformers` does."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=config.init_std)
            with torch.no_grad():
                module.weight[config.pad_token_id] = 0


def embed(
    embedding: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None, config: MoEConfig
) -> tuple[Tensor, Tensor]:
    """Embeddings `[B, S, D]`, and `[B, S]` bool that is True where a position counts."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
    if inputs_embeds is not None:
        return inputs_embeds, inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.bool)
    assert input_ids is not None
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, S]; got {list(input_ids.shape)}")
    scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
    return embedding(input_ids) * scale, input_ids != config.pad_token_id


def padding_from_attention_mask(attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The ecosystem's mask (1 for words) as the router's (True where padded)."""
    if attention_mask is None:
        return None
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must be {list(shape)}, 1 for words; got {list(attention_mask.shape)}"
        )
    return attention_mask == 0


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


def drop_layer(probability: float, training: bool) -> bool:
    """LayerDrop (Fan et al. 2019): skip a layer in training with this probability. Drawn on the CPU: no sync."""
    return training and probability > 0 and torch.rand(()).item() < probability


def maybe_checkpoint(enabled: bool, layer: Callable[..., T], *args: Any) -> T:
    """Run `layer`, recomputing it in backward if `enabled`."""
    if not enabled:
        return layer(*args)
    return checkpoint(layer, *args, use_reentrant=False)
