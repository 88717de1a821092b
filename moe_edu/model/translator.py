"""The translator: encoder, decoder, and one embedding that both share with the output layer.

Shapes: B batch, S source length, L target length, D model width, V vocabulary.
Source: NLLB Team 2022, section 6; the computation is that of `transformers` 4.x `NllbMoeForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from moe_edu.config import MoEConfig
from moe_edu.model.checkpoint import hf_state_dict, load_hf_state_dict
from moe_edu.model.decoder import DecoderOutput, MoEDecoder
from moe_edu.model.embedding import initialize, make_embedding
from moe_edu.model.encoder import EncoderOutput, MoEEncoder
from moe_edu.model.generation import generate
from moe_edu.model.layers import LayerCache
from moe_edu.moe.routing import RouterOutput


class TranslatorOutput(NamedTuple):
    """Logits `[B, L, V]` and what the two halves returned."""

    logits: Tensor
    encoder: EncoderOutput
    decoder: DecoderOutput

    @property
    def routing(self) -> tuple[RouterOutput | None, ...]:
        """One entry per layer, the encoder's first."""
        return self.encoder.routing + self.decoder.routing


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
            decoder_input_ids: `[B, L]`, the target shifted right: it begins with `config.decoder_start_token_id`.
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
        return TranslatorOutput(self.decoder.logits(decoded.last_hidden_state), encoder_output, decoded)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        forced_bos_token_id: int | None = None,
        num_beams: int = 1,
        max_new_tokens: int = 128,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
    ) -> Tensor:
        """Translate `input_ids [B, S]` by greedy or beam search, in eval mode.

        Arguments, result `[B, L]` and errors are those of `moe_edu.model.generation.generate`.
        """
        return generate(
            self.encoder,
            self.decoder,
            input_ids,
            attention_mask,
            forced_bos_token_id=forced_bos_token_id,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )

    def load_hf_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy in the state dict of `NllbMoeForConditionalGeneration` or `NllbMoeModel`."""
        load_hf_state_dict(self, state_dict)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under `NllbMoeForConditionalGeneration`'s names, sharing memory with the model."""
        return hf_state_dict(self)
