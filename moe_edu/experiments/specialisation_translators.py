"""Which tokens a translator's experts get: its routing over sentence pairs, in encoder and decoder.

The decoder reads the true translation, token by token, so that every model routes the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_edu.config import MoEConfig
from moe_edu.data import UNDETERMINED, Corpus, SentencePair, Tokenizer, eval_batches
from moe_edu.data.text import WORD_START
from moe_edu.experiments.specialisation_measure import RoutedTokens
from moe_edu.model.pretrained import TextTranslator
from moe_edu.model.translator import MoETranslator
from moe_edu.moe.routing import RouterOutput
from moe_edu.training.loop import TrainingResult, train
from moe_edu.training.settings import TrainingSettings

MANY_TO_MANY = (
    "arb_Arab",
    "deu_Latn",
    "ell_Grek",
    "eng_Latn",
    "fin_Latn",
    "fra_Latn",
    "hin_Deva",
    "rus_Cyrl",
    "spa_Latn",
    "tur_Latn",
)


class TranslatorRouting(NamedTuple):
    """The routing of a translator's last sparse layers; None for a half without one.

    Attributes:
        encoder: the source tokens; `language` is the source language.
        decoder: the target tokens that the decoder reads; `language` is the target language.
        decoder_source_language: `[N]` int64, the source language of each token of `decoder`.
    """

    encoder: RoutedTokens | None
    decoder: RoutedTokens | None
    decoder_source_language: Tensor | None


@torch.no_grad()
def route_pairs(translator: TextTranslator, pairs: Sequence[SentencePair]) -> TranslatorRouting:
    """Route every pair through `translator`, in eval mode, where nothing is dropped."""
    model, tokenizer = translator.model.eval(), translator.tokenizer
    encoder, decoder, decoder_source = [], [], []
    start = 0
    for batch in eval_batches(pairs, tokenizer):
        encoded = model.encoder(batch.source_ids, batch.source_mask)
        layer = _last_sparse(encoded.routing)
        if layer is not None:
            encoder.append(_route(batch.source_ids, batch.source_languages, layer, start, tokenizer))
        if any(_is_sparse(layer) for layer in model.decoder.layers):
            output = model(
                None,
                batch.source_mask,
                batch.decoder_input_ids,
                batch.decoder_mask,
                encoder_output=encoded,
            )
            layer = _last_sparse(output.decoder.routing)
            assert layer is not None
            decoder.append(_route(batch.decoder_input_ids, batch.target_languages, layer, start, tokenizer))
            decoder_source.append(
                _route(batch.decoder_input_ids, batch.source_languages, layer, start, tokenizer).language
            )
        start += len(batch)
    return TranslatorRouting(
        RoutedTokens.join(encoder) if encoder else None,
        RoutedTokens.join(decoder) if decoder else None,
        torch.cat(decoder_source) if decoder_source else None,
    )


def _last_sparse(routing: Sequence[RouterOutput | None]) -> RouterOutput | None:
    return next((layer for layer in reversed(routing) if layer is not None), None)


def _is_sparse(layer: torch.nn.Module) -> bool:
    return hasattr(layer.ffn, "router")


def _route(
    ids: Tensor, languages: Sequence[str], layer: RouterOutput, start: int, tokenizer: Tokenizer
) -> RoutedTokens:
    """The tokens of `ids [B, S]` that are text, and their choices; sentences are numbered from `start`."""
    B, S = ids.shape
    text = ids > tokenizer.language_id(UNDETERMINED)  # special tokens and tags have lower ids
    names = tuple(tokenizer.tokens(range(len(tokenizer))))
    visible = torch.tensor([name.strip(WORD_START) != "" for name in names])
    language = torch.tensor([tokenizer.languages.index(code) for code in languages])
    token = ids[text]
    return RoutedTokens(
        num_experts=layer.num_experts,
        expert_index=layer.expert_index[text.flatten()],
        sentence=(torch.arange(B)[:, None] + start).expand(B, S)[text],
        language=language[:, None].expand(B, S)[text],
        token=token,
        position=torch.arange(S).expand(B, S)[text],
        word=token.where(visible[token], -1),
        languages=tokenizer.languages,
        words=names,
    )


def untrained_translator(trained: TextTranslator, seed: int) -> TextTranslator:
    """A translator of the same shape and tokenizer with the random weights at the start of a run with `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return replace(trained, model=MoETranslator(trained.model.config).eval())


def train_translator(
    corpus: Corpus, settings: TrainingSettings, fields: Mapping[str, Any], test_sentences: int
) -> TrainingResult:
    """`moe_edu.training.loop.train` in memory, without validation during training."""
    return train(
        corpus,
        replace(settings, eval_sentences=0),
        model_fields=fields,
        test_sentences=test_sentences,
        show_progress=False,
    )


def many_to_many_fields(**fields: Any) -> dict[str, Any]:
    """Half as wide as `small_config`, with experts in its decoder layer too; `fields` override."""
    narrow = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "init_std": 0.1}
    return {"decoder_sparse_step": 1, **narrow, **fields}


def describe_config(config: MoEConfig) -> dict[str, Any]:
    """The fields in which the models differ."""
    names = (
        "d_model",
        "encoder_layers",
        "encoder_sparse_step",
        "encoder_ffn_dim",
        "decoder_layers",
        "decoder_sparse_step",
        "decoder_ffn_dim",
        "num_experts",
        "expert_capacity_factor",
        "router_aux_loss_coef",
        "router_z_loss_coef",
    )
    return {name: getattr(config, name) for name in names}
