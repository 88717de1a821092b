"""Greedy and beam search over a key/value cache.

Shapes: B sentences, W beams, L tokens so far, V vocabulary.
Both follow `transformers` 4.x (`generation/utils.py`), token for token; tests hold them to it. Two things are done
otherwise, for speed: a sentence that is finished leaves the batch, and the beams of a sentence share its source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_edu.layers import KeyValue, LayerCache

if TYPE_CHECKING:
    from moe_edu.config import MoEConfig
    from moe_edu.model import EncoderOutput, MoETranslator

# Stands for "impossible" in beam scores; finite, so that adding to it never gives NaN.
_IMPOSSIBLE = -1.0e9

Cache = tuple[LayerCache, ...]


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
    sources = _Sources(model.encoder(input_ids, attention_mask), attention_mask)
    if num_beams == 1:
        return _greedy(model, sources, forced_bos_token_id, max_new_tokens)
    return _beam_search(
        model, sources, forced_bos_token_id, num_beams, max_new_tokens, length_penalty, early_stopping
    )


class _Sources(NamedTuple):
    """The encoded sentences that are still being translated, and their mask."""

    encoded: EncoderOutput
    mask: Tensor | None

    def take(self, rows: Tensor) -> _Sources:
        hidden = self.encoded.last_hidden_state[rows]
        return _Sources(
            self.encoded._replace(last_hidden_state=hidden), None if self.mask is None else self.mask[rows]
        )


def _next_log_probs(
    model: MoETranslator, sources: _Sources, last_token: Tensor, cache: Cache | None, forced: int | None
) -> tuple[Tensor, Cache]:
    """`[B * W, 1]` tokens and the cache to fp32 log-probabilities `[B * W, V]` and the next cache.

    Without a cache, at the first step, only `forced` is possible where it is given.
    """
    output = model(
        attention_mask=sources.mask,
        decoder_input_ids=last_token,
        encoder_output=sources.encoded,
        cache=cache,
        use_cache=True,
    )
    log_probs = output.logits[:, -1].float().log_softmax(-1)
    if cache is None and forced is not None:
        log_probs.fill_(-torch.inf)
        log_probs[:, forced] = 0.0
    assert output.decoder.cache is not None
    return log_probs, output.decoder.cache


def _are_independent(config: MoEConfig) -> bool:
    """Whether a sentence may leave the batch: not where the sentences compete for the room of the decoder's experts."""
    sparse = any(config.is_sparse(i, config.decoder_sparse_step) for i in range(config.decoder_layers))
    return not sparse or config.moe_eval_capacity_token_fraction >= 1


def _greedy(model: MoETranslator, sources: _Sources, forced: int | None, max_new_tokens: int) -> Tensor:
    config = model.config
    B, device = sources.encoded.last_hidden_state.shape[0], sources.encoded.last_hidden_state.device
    tokens = torch.full((B, 1 + max_new_tokens), config.pad_token_id, device=device)
    tokens[:, 0] = config.decoder_start_token_id
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    going = torch.arange(B, device=device)  # the rows of `tokens` that are in the batch
    cache, length = None, 0
    while length < max_new_tokens and not finished.all():
        log_probs, cache = _next_log_probs(model, sources, tokens[going, length : length + 1], cache, forced)
        length += 1
        token = log_probs.argmax(-1).masked_fill(finished[going], config.pad_token_id)
        tokens[going, length] = token
        finished[going] |= token == config.eos_token_id
        stay = (~finished[going]).nonzero()[:, 0]
        if len(stay) < len(going) and _are_independent(config):
            going, sources, cache = going[stay], sources.take(stay), _select(cache, stay, stay)
    return tokens[:, : 1 + length]


class _Beams(NamedTuple):
    """The hypotheses of B sentences, W running and W finished each, both sorted by score.

    running, done: `[B, W, 1 + max_new_tokens]` tokens.
    running_scores: `[B, W]` sums of log-probabilities; done_scores: the same over length to the penalty's power.
    done_lengths: `[B, W]` tokens written, `</s>` included.
    is_done: `[B, W]` bool, whether there is a finished hypothesis at that place.
    can_improve: `[B]` bool, whether a running hypothesis may still beat the worst that is finished.
    """

    running: Tensor
    running_scores: Tensor
    done: Tensor
    done_scores: Tensor
    done_lengths: Tensor
    is_done: Tensor
    can_improve: Tensor

    @classmethod
    def start(cls, B: int, W: int, max_new_tokens: int, config: MoEConfig, device: torch.device) -> _Beams:
        tokens = torch.full((B, W, 1 + max_new_tokens), config.pad_token_id, device=device)
        tokens[:, :, 0] = config.decoder_start_token_id
        impossible = torch.full((B, W), _IMPOSSIBLE, device=device)
        scores = impossible.clone()
        scores[:, 0] = 0.0  # all beams are equal at the start: only one may branch
        nothing = torch.zeros(B, W, dtype=torch.long, device=device)
        return cls(tokens, scores, tokens, impossible, nothing, nothing.bool(), nothing[:, 0] == 0)

    def settled(self, early_stopping: bool) -> Tensor:
        """`[B]` bool: nothing that comes can change the translation."""
        return ~self.can_improve | (self.is_done.all(1) & early_stopping)

    def take(self, rows: Tensor) -> _Beams:
        return _Beams(*(part[rows] for part in self))


def _beam_search(
    model: MoETranslator,
    sources: _Sources,
    forced: int | None,
    W: int,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: bool,
) -> Tensor:
    config = model.config
    B, device = sources.encoded.last_hidden_state.shape[0], sources.encoded.last_hidden_state.device
    beams = _Beams.start(B, W, max_new_tokens, config, device)
    best = beams.done[:, 0].clone()
    lengths = torch.zeros(B, dtype=torch.long, device=device)
    going = torch.arange(B, device=device)  # the rows of `best` that are in the batch
    cache: Cache | None = None
    for length in range(1, max_new_tokens + 1):
        last_token = beams.running[:, :, length - 1].reshape(-1, 1)
        log_probs, cache = _next_log_probs(model, sources, last_token, cache, forced)
        beams, parents = _extend(
            beams, log_probs, length, length_penalty, early_stopping, config.eos_token_id
        )
        settled = beams.settled(early_stopping)
        over = length == max_new_tokens or bool(settled.all())
        leave = settled if _are_independent(config) and not over else settled.new_full(settled.shape, over)
        best[going[leave]] = beams.done[leave, 0]
        lengths[going[leave]] = beams.done_lengths[leave, 0]
        if over:
            break
        stay = (~leave).nonzero()[:, 0]
        rows = (stay[:, None] * W + parents[stay]).view(-1)
        if len(stay) < len(going):
            going, sources, beams = going[stay], sources.take(stay), beams.take(stay)
            cache = _select(cache, rows, stay)
        else:
            cache = _select(cache, rows)
    return best[:, : 1 + int(lengths.max())]


def _extend(
    beams: _Beams, log_probs: Tensor, length: int, length_penalty: float, early_stopping: bool, eos: int
) -> tuple[_Beams, Tensor]:
    """Write token number `length` of every hypothesis, whose `log_probs [B * W, V]` are overwritten.

    Returns:
        The beams, and `[B, W]`: which beam of its sentence each running hypothesis goes on from.
    """
    (B, W), V = beams.running_scores.shape, log_probs.shape[-1]
    device = log_probs.device
    rows = torch.arange(B, device=device)[:, None]
    totals = log_probs.view(B, W, V).add_(beams.running_scores[:, :, None]).view(B, W * V)
    # Twice as many candidates as beams: even if W of them end here, W are left to go on.
    scores, index = totals.topk(2 * W)
    parent, token = index // V, index % V
    candidates = beams.running[rows, parent]
    candidates[:, :, length] = token
    ends = (token == eos) | (length == beams.running.shape[2] - 1)

    # Finished: of the W best candidates, those that end; merged with those finished before.
    eligible = ends & (torch.arange(2 * W, device=device) < W)
    final = scores / length**length_penalty
    closed = beams.settled(early_stopping)[:, None]
    final = final + _IMPOSSIBLE * (~eligible).float() + _IMPOSSIBLE * closed.float()
    done_scores, best = torch.cat([beams.done_scores, final], 1).topk(W)
    done = torch.cat([beams.done, candidates], 1)[rows, best]
    is_done = torch.cat([beams.is_done, eligible], 1)[rows, best]
    done_lengths = torch.cat([beams.done_lengths, torch.full_like(token, length)], 1)[rows, best]

    # Running: the W best candidates that do not end.
    running_scores, survivors = (scores + _IMPOSSIBLE * ends.float()).topk(W)
    running = candidates[rows, survivors]

    worst = done_scores.amin(1).where(is_done.all(1), _IMPOSSIBLE)
    can_improve = beams.can_improve & (running_scores[:, 0] / length**length_penalty > worst)
    extended = _Beams(running, running_scores, done, done_scores, done_lengths, is_done, can_improve)
    return extended, parent.gather(1, survivors)


def _select(cache: Cache, rows: Tensor, sources: Tensor | None = None) -> Cache:
    """The cache of the hypotheses `rows`, and of the sentences `sources` where some have left."""
    return tuple(
        LayerCache(
            _take(layer.self_attention, rows),
            layer.cross_attention if sources is None else _take(layer.cross_attention, sources),
        )
        for layer in cache
    )


def _take(memory: KeyValue, rows: Tensor) -> KeyValue:
    return KeyValue(memory.key.index_select(0, rows), memory.value.index_select(0, rows))
