"""Greedy and beam search over a key/value cache.

Shapes: B sentences, W beams, L tokens so far, V vocabulary.
Both follow `transformers` 4.x (`generation/utils.py`), token for token; tests hold them to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_edu.layers import KeyValue, LayerCache

if TYPE_CHECKING:
    from moe_edu.model import EncoderOutput, MoETranslator

# Stands for "impossible" in beam scores; finite, so that adding to it never gives NaN.
_IMPOSSIBLE = -1.0e9

Cache = tuple[LayerCache, ...]
Step = Callable[[Tensor, Cache | None], tuple[Tensor, Cache]]


@torch.no_grad()
def generate(
    model: MoETranslator,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    forced_bos_token_id: int | None = None,
    num_beams: int = 1,
    max_new_tokens: int = 128,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> Tensor:
    """Translate a batch.

    Args:
        model: in eval mode.
        input_ids: `[B, S]` source ids.
        attention_mask: `[B, S]`, 1 for words.
        forced_bos_token_id: first generated token, in NLLB the tag of the target language.
        num_beams: 1 is greedy search.
        max_new_tokens: longest output, the start token not counted.
        length_penalty: beam scores are divided by length to this power.
        early_stopping: end a sentence as soon as `num_beams` of its hypotheses are finished.

    Returns:
        `[B, L]` int64: the start token, the translation, `</s>`, padding.

    Raises:
        ValueError: the model is in training mode, or an option is out of range.
    """
    if model.training:
        raise ValueError("generate() needs model.eval(): dropout would disturb the search")
    config = model.config
    if num_beams < 1 or max_new_tokens < 1:
        raise ValueError(
            f"num_beams and max_new_tokens must be at least 1; got {num_beams}, {max_new_tokens}"
        )
    max_new_tokens = min(max_new_tokens, config.max_position_embeddings)
    encoded = model.encoder(input_ids, attention_mask)
    start = input_ids.new_full((input_ids.shape[0], 1), config.decoder_start_token_id)
    if num_beams == 1:
        step = _make_step(model, encoded, attention_mask)
        return _greedy(
            step, start, forced_bos_token_id, max_new_tokens, config.eos_token_id, config.pad_token_id
        )
    encoded = encoded._replace(last_hidden_state=encoded.last_hidden_state.repeat_interleave(num_beams, 0))
    mask = None if attention_mask is None else attention_mask.repeat_interleave(num_beams, 0)
    return _beam_search(
        _make_step(model, encoded, mask),
        start,
        forced_bos_token_id,
        num_beams,
        max_new_tokens,
        length_penalty,
        early_stopping,
        config.eos_token_id,
        config.pad_token_id,
    )


def _make_step(model: MoETranslator, encoded: EncoderOutput, attention_mask: Tensor | None) -> Step:
    def step(last_token: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """`[B, 1]` tokens and the cache to fp32 log-probabilities `[B, V]` and the next cache."""
        output = model(
            attention_mask=attention_mask,
            decoder_input_ids=last_token,
            encoder_output=encoded,
            cache=cache,
            use_cache=True,
        )
        assert output.decoder.cache is not None
        return output.logits[:, -1].float().log_softmax(-1), output.decoder.cache

    return step


def _force(log_probs: Tensor, token: int | None, first: bool) -> Tensor:
    """Leave only `token` possible at the first step."""
    if token is None or not first:
        return log_probs
    return torch.full_like(log_probs, -torch.inf).index_fill(
        -1, torch.tensor([token], device=log_probs.device), 0.0
    )


def _greedy(
    step: Step, tokens: Tensor, forced: int | None, max_new_tokens: int, eos: int, pad: int
) -> Tensor:
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    cache = None
    for i in range(max_new_tokens):
        log_probs, cache = step(tokens[:, -1:], cache)
        token = _force(log_probs, forced, i == 0).argmax(-1).masked_fill(finished, pad)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        finished |= token == eos
        if finished.all():
            break
    return tokens


def _beam_search(
    step: Step,
    start: Tensor,
    forced: int | None,
    W: int,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: bool,
    eos: int,
    pad: int,
) -> Tensor:
    """Keep W running and W finished hypotheses a sentence; both sorted by score."""
    B, device = start.shape[0], start.device
    rows = torch.arange(B, device=device)[:, None]
    running = start.new_full((B, W, 1 + max_new_tokens), pad)
    running[:, :, :1] = start[:, None]
    done = running.clone()
    running_scores = torch.full((B, W), _IMPOSSIBLE, device=device)
    running_scores[:, 0] = 0.0  # all beams are equal at the start: only one may branch
    done_scores = torch.full((B, W), _IMPOSSIBLE, device=device)
    done_lengths = start.new_zeros(B, W)
    is_done = torch.zeros(B, W, dtype=torch.bool, device=device)
    can_improve = torch.ones(B, 1, dtype=torch.bool, device=device)
    cache: Cache | None = None

    for length in range(1, max_new_tokens + 1):
        log_probs, cache = step(running[:, :, length - 1].reshape(B * W, 1), cache)
        log_probs = _force(log_probs, forced, length == 1)
        V = log_probs.shape[-1]
        totals = (log_probs.view(B, W, V) + running_scores[:, :, None]).view(B, W * V)
        # Twice as many candidates as beams: even if W of them end here, W are left to go on.
        scores, index = totals.topk(2 * W)
        parent, token = index // V, index % V
        candidates = running[rows, parent]
        candidates[:, :, length] = token
        ends = (token == eos) | (length == max_new_tokens)

        # Finished: of the W best candidates, those that end; merged with those finished before.
        eligible = ends & (torch.arange(2 * W, device=device) < W)
        final = scores / length**length_penalty
        closed = (is_done.all(1, keepdim=True) & early_stopping) | ~can_improve
        final = final + _IMPOSSIBLE * (~eligible).float() + _IMPOSSIBLE * closed.float()
        done_scores, best = torch.cat([done_scores, final], 1).topk(W)
        done = torch.cat([done, candidates], 1)[rows, best]
        is_done = torch.cat([is_done, eligible], 1)[rows, best]
        done_lengths = torch.cat([done_lengths, torch.full_like(token, length)], 1)[rows, best]

        # Running: the W best candidates that do not end.
        running_scores, survivors = (scores + _IMPOSSIBLE * ends.float()).topk(W)
        running = candidates[rows, survivors]
        beams = (rows * W + parent.gather(1, survivors)).view(-1)
        cache = tuple(_reorder(layer, beams) for layer in cache)

        worst = done_scores.amin(1, keepdim=True).where(is_done.all(1, keepdim=True), _IMPOSSIBLE)
        can_improve &= running_scores[:, :1] / length**length_penalty > worst
        if not can_improve.any() or (early_stopping and is_done.all()):
            break

    return done[:, 0, : 1 + int(done_lengths[:, 0].max())]


def _reorder(layer: LayerCache, beams: Tensor) -> LayerCache:
    """Follow the surviving beams. Beams of one sentence share their source, so cross-attention stays as it is."""
    key, value = layer.self_attention
    return layer._replace(self_attention=KeyValue(key.index_select(0, beams), value.index_select(0, beams)))
