"""Greedy and beam search over a key/value cache.

Shapes: B sentences, W beams, R of them running, P tokens that are given, L tokens so far, V vocabulary.
Both follow `transformers` 4.x (`generation/utils.py`), token for token; tests hold them to it. Three things
differ, for speed: a finished sentence leaves the batch, the beams of a sentence share its source, and they
share a row until they differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_edu.config import MoEConfig
from moe_edu.model.decoder import MoEDecoder
from moe_edu.model.encoder import MoEEncoder
from moe_edu.model.layers import KeyValue, LayerCache

# Stands for "impossible" in beam scores; finite, so that adding to it never gives NaN.
_IMPOSSIBLE = -1.0e9

Cache = tuple[LayerCache, ...]


@torch.no_grad()
def generate(
    encoder: MoEEncoder,
    decoder: MoEDecoder,
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
        encoder: in eval mode.
        decoder: in eval mode, and of the same configuration.
        input_ids: `[B, S]` source ids; B may be 0.
        attention_mask: `[B, S]`, 1 for words.
        forced_bos_token_id: first generated token, in NLLB the tag of the target language.
        num_beams: 1 is greedy search.
        max_new_tokens: longest output, the start token not counted.
        length_penalty: beam scores are divided by length to this power.
        early_stopping: stop a sentence as soon as `num_beams` of its hypotheses are finished.

    Returns:
        `[B, L]` int64: the start token, the translation, `</s>`, padding.

    Raises:
        ValueError: the model is in training mode, or an option is out of range.
    """
    if encoder.training or decoder.training:
        raise ValueError("generate() needs model.eval(): dropout would disturb the search")
    config = decoder.config
    if num_beams < 1 or max_new_tokens < 1:
        raise ValueError(
            f"num_beams and max_new_tokens must be at least 1; got {num_beams}, {max_new_tokens}"
        )
    max_new_tokens = min(max_new_tokens, config.max_position_embeddings)
    given = [config.decoder_start_token_id]
    if forced_bos_token_id is not None:
        given.append(forced_bos_token_id)
    prompt = torch.tensor(given, device=input_ids.device).repeat(len(input_ids), 1)
    if len(prompt) == 0 or len(given) > max_new_tokens or forced_bos_token_id == config.eos_token_id:
        return prompt  # nothing is left to choose
    sources = _Sources(encoder(input_ids, attention_mask).last_hidden_state, attention_mask)
    if num_beams == 1:
        return _greedy(decoder, sources, prompt, max_new_tokens)
    return _beam_search(decoder, sources, prompt, num_beams, max_new_tokens, length_penalty, early_stopping)


class _Sources(NamedTuple):
    """The encoded sentences that are still being translated, `[B, S, D]`, and their mask `[B, S]`."""

    hidden: Tensor
    mask: Tensor | None

    def take(self, rows: Tensor) -> _Sources:
        return _Sources(self.hidden[rows], None if self.mask is None else self.mask[rows])


def _decode(
    decoder: MoEDecoder, sources: _Sources, tokens: Tensor, cache: Cache | None
) -> tuple[Tensor, Cache]:
    """Decode `tokens [B * R, L]`, which follow those in `cache`: the last hidden states `[B * R, D]`, the new cache."""
    output = decoder(tokens, sources.hidden, sources.mask, cache=cache, use_cache=True)
    assert output.cache is not None
    return output.last_hidden_state[:, -1], output.cache


def _are_independent(config: MoEConfig) -> bool:
    """Whether a sentence may leave the batch; False if sentences compete for slots in the decoder's experts."""
    sparse = any(config.is_sparse(i, config.decoder_sparse_step) for i in range(config.decoder_layers))
    return not sparse or config.moe_eval_capacity_token_fraction >= 1


def _greedy(decoder: MoEDecoder, sources: _Sources, prompt: Tensor, max_new_tokens: int) -> Tensor:
    config = decoder.config
    (B, length), device = prompt.shape, prompt.device
    tokens = torch.full((B, 1 + max_new_tokens), config.pad_token_id, device=device)
    tokens[:, :length] = prompt
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    going = torch.arange(B, device=device)  # the rows of `tokens` that are in the batch
    cache, last = None, prompt
    while length <= max_new_tokens and not finished.all():
        hidden, cache = _decode(decoder, sources, last, cache)
        token = decoder.logits(hidden).argmax(-1).masked_fill(finished[going], config.pad_token_id)
        tokens[going, length] = token
        finished[going] |= token == config.eos_token_id
        stay = (~finished[going]).nonzero()[:, 0]
        if len(stay) < len(going) and _are_independent(config):
            going, sources, cache = going[stay], sources.take(stay), _select(cache, stay, stay)
        last = tokens[going, length : length + 1]
        length += 1
    return tokens[:, :length]


class _Beams(NamedTuple):
    """The hypotheses of B sentences, at most W running and W finished each, both sorted by score.

    running, done: `[B, R, 1 + max_new_tokens]` and `[B, W, 1 + max_new_tokens]` tokens.
    running_scores: `[B, R]` sums of log-probabilities.
    done_scores: `[B, W]`, the sums divided by `length ** length_penalty`.
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
    def start(cls, prompt: Tensor, W: int, max_new_tokens: int, pad: int) -> _Beams:
        """One running hypothesis per sentence: its `prompt [B, P]`."""
        (B, P), device = prompt.shape, prompt.device
        running = torch.full((B, 1, 1 + max_new_tokens), pad, device=device)
        running[:, 0, :P] = prompt
        nothing = torch.zeros(B, W, dtype=torch.long, device=device)
        return cls(
            running=running,
            running_scores=torch.zeros(B, 1, device=device),
            done=running.expand(B, W, 1 + max_new_tokens),
            done_scores=torch.full((B, W), _IMPOSSIBLE, device=device),
            done_lengths=nothing,
            is_done=nothing.bool(),
            can_improve=nothing[:, 0] == 0,
        )

    def settled(self, early_stopping: bool) -> Tensor:
        """`[B]` bool: nothing that follows can change the translation."""
        return ~self.can_improve | (self.is_done.all(1) & early_stopping)

    def take(self, rows: Tensor) -> _Beams:
        return _Beams(*(part[rows] for part in self))


def _beam_search(
    decoder: MoEDecoder,
    sources: _Sources,
    prompt: Tensor,
    W: int,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: bool,
) -> Tensor:
    config = decoder.config
    (B, P), device = prompt.shape, prompt.device
    beams = _Beams.start(prompt, W, max_new_tokens, config.pad_token_id)
    best = beams.done[:, 0].clone()
    lengths = torch.zeros(B, dtype=torch.long, device=device)
    going = torch.arange(B, device=device)  # the rows of `best` that are in the batch
    cache, last = None, prompt
    for length in range(P, max_new_tokens + 1):
        R = beams.running.shape[1]
        hidden, cache = _decode(decoder, sources, last, cache)
        candidates = _best_candidates(decoder, hidden, beams.running_scores, 2 * W)
        beams, parents = _extend(
            beams, candidates, length, length_penalty, early_stopping, config.eos_token_id
        )
        settled = beams.settled(early_stopping)
        over = length == max_new_tokens or bool(settled.all())
        leave = settled if _are_independent(config) and not over else settled.new_full(settled.shape, over)
        best[going[leave]] = beams.done[leave, 0]
        lengths[going[leave]] = beams.done_lengths[leave, 0]
        if over:
            break
        stay = (~leave).nonzero()[:, 0]
        rows = (stay[:, None] * R + parents[stay]).view(-1)
        if len(stay) < len(going):
            going, sources, beams = going[stay], sources.take(stay), beams.take(stay)
            cache = _select(cache, rows, stay)
        else:
            cache = _select(cache, rows)
        last = beams.running[:, :, length].reshape(-1, 1)
    return best[:, : 1 + int(lengths.max())]


class _Candidates(NamedTuple):
    """The best continuations of each sentence, best first, each `[B, C]`.

    scores: sums of log-probabilities.
    parent: the running hypothesis that is continued.
    token: the one to write.
    """

    scores: Tensor
    parent: Tensor
    token: Tensor


def _best_candidates(decoder: MoEDecoder, hidden: Tensor, running_scores: Tensor, count: int) -> _Candidates:
    """From the last hidden states `[B * R, D]` and the scores `[B, R]`; C is `count`, or R * V where that is less."""
    (B, R), V = running_scores.shape, decoder.config.vocab_size
    # A token outside the top `count` of its own hypothesis cannot be in the top `count` of the sentence.
    log_probs, tokens = decoder.most_probable(hidden, min(count, V))
    scores = (log_probs.view(B, R, -1) + running_scores[:, :, None]).flatten(1)
    scores, index = scores.topk(min(count, R * V))
    return _Candidates(scores, index // log_probs.shape[1], tokens.view(B, -1).gather(1, index))


def _extend(
    beams: _Beams,
    new: _Candidates,
    length: int,
    length_penalty: float,
    early_stopping: bool,
    eos: int,
) -> tuple[_Beams, Tensor]:
    """Write token number `length` of every hypothesis.

    `new` holds twice as many candidates as there are beams: even if W of them end here, W are left to continue.

    Returns:
        The beams, and which beam of its sentence each running hypothesis continues, `[B, R]`.
    """
    (B, W), C, device = beams.done_scores.shape, new.scores.shape[1], new.scores.device
    rows = torch.arange(B, device=device)[:, None]
    candidates = beams.running[rows, new.parent]
    candidates[:, :, length] = new.token
    ends = (new.token == eos) | (length == beams.running.shape[2] - 1)

    # Finished: of the W best candidates, those that end; merged with those finished before.
    eligible = ends & (torch.arange(C, device=device) < W)
    final = new.scores / length**length_penalty
    closed = beams.settled(early_stopping)[:, None]
    final = final + _IMPOSSIBLE * (~eligible).float() + _IMPOSSIBLE * closed.float()
    done_scores, best = torch.cat([beams.done_scores, final], 1).topk(W)
    done = torch.cat([beams.done, candidates], 1)[rows, best]
    is_done = torch.cat([beams.is_done, eligible], 1)[rows, best]
    done_lengths = torch.cat([beams.done_lengths, torch.full_like(new.token, length)], 1)[rows, best]

    # Running: the W best candidates that do not end.
    running_scores, survivors = (new.scores + _IMPOSSIBLE * ends.float()).topk(min(W, C))
    running = candidates[rows, survivors]

    worst = done_scores.amin(1).where(is_done.all(1), _IMPOSSIBLE)
    can_improve = beams.can_improve & (running_scores[:, 0] / length**length_penalty > worst)
    extended = _Beams(running, running_scores, done, done_scores, done_lengths, is_done, can_improve)
    return extended, new.parent.gather(1, survivors)


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
