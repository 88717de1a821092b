"""Sentence pairs as padded tensors: an endless shuffled stream for training, ordered batches for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_edu.data.corpus import Corpus, SentencePair, Table
from moe_edu.data.languages import require_languages
from moe_edu.data.tokenizer import UNDETERMINED, Tokenizer

POOL_PAIRS = 2048  # pairs sorted by length together: more of them save padding, fewer mix the batches better


@dataclass(frozen=True)
class Batch:
    """B pairs; S and L are the tokens of the longest source and target.

    source_ids: int64 [B, S], `[language] tokens </s>` and padding.
    source_mask: int64 [B, S], 1 for words, 0 for padding.
    decoder_input_ids: int64 [B, L], `</s> [language] tokens`: the labels shifted right, as NLLB does.
    decoder_mask: int64 [B, L], 1 for labels, 0 for padding.
    labels: int64 [B, L], `[language] tokens </s>` and padding.
    source_languages, target_languages: the B codes; the true source even if its tag is `und`.
    """

    source_ids: Tensor
    source_mask: Tensor
    decoder_input_ids: Tensor
    decoder_mask: Tensor
    labels: Tensor
    source_languages: tuple[str, ...]
    target_languages: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source_languages)

    @property
    def num_tokens(self) -> int:
        """Source and target tokens, without padding."""
        return int(self.source_mask.sum() + self.decoder_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            source_ids=self.source_ids.to(device),
            source_mask=self.source_mask.to(device),
            decoder_input_ids=self.decoder_input_ids.to(device),
            decoder_mask=self.decoder_mask.to(device),
            labels=self.labels.to(device),
        )

    def split(self, parts: int) -> list[Batch]:
        """At most `parts` batches: the pairs are dealt out in turn, so that lengths stay similar."""
        return [self._every(slice(i, None, parts)) for i in range(min(parts, len(self)))]

    def _every(self, pairs: slice) -> Batch:
        S, L = (int(mask[pairs].sum(dim=1).max()) for mask in (self.source_mask, self.decoder_mask))
        return Batch(
            source_ids=self.source_ids[pairs, :S],
            source_mask=self.source_mask[pairs, :S],
            decoder_input_ids=self.decoder_input_ids[pairs, :L],
            decoder_mask=self.decoder_mask[pairs, :L],
            labels=self.labels[pairs, :L],
            source_languages=self.source_languages[pairs],
            target_languages=self.target_languages[pairs],
        )

    def describe(self) -> str:
        """One line for error messages."""
        directions = zip(self.source_languages, self.target_languages, strict=True)
        listed = sorted({f"{source} to {target}" for source, target in directions})
        more = f" and {len(listed) - 3} more directions" if len(listed) > 3 else ""
        shapes = f"sources {tuple(self.source_ids.shape)}, targets {tuple(self.labels.shape)}"
        return f"{len(self)} pairs ({', '.join(listed[:3])}{more}), {shapes}"


@dataclass(frozen=True)
class TokenTable:
    """A `Table` as token ids without tags and `</s>`, cell after cell, row by row.

    tokens: int32 [all tokens].
    starts: int64 [cells + 1], where each cell begins. Cell `row * num_languages + column` holds the sentence of that
        row and column; a missing one has no tokens.
    """

    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def encode(cls, table: Table, tokenizer: Tokenizer) -> TokenTable:
        """Tokenize every cell, once."""
        cells = tokenizer.encode_pieces([text or "" for row in table.rows for text in row])
        starts = np.zeros(len(cells) + 1, dtype=np.int64)
        np.cumsum([len(cell) for cell in cells], out=starts[1:])
        tokens = np.fromiter(chain.from_iterable(cells), dtype=np.int32, count=int(starts[-1]))
        return cls(tokens, starts)

    def cell(self, i: int) -> NDArray[np.int32]:
        return self.tokens[self.starts[i] : self.starts[i + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of every cell."""
        return np.diff(self.starts)


class EpochPlan(NamedTuple):
    """The P pairs of one epoch, sorted into batches.

    sources, targets: int64 [P], cells of the `TokenTable`.
    undetermined: bool [P], whether the source's tag is `und`.
    edges: batch b holds the pairs from `edges[b]` to `edges[b + 1]`.
    order: int64 [batches], the order in which batches are used.
    """

    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    undetermined: NDArray[np.bool_]
    edges: list[int]
    order: NDArray[np.int64]


class PairBatches:
    """An endless, shuffled stream of training batches.

    In an epoch every sentence of every source language is a source once. Its target is drawn from the other `targets`
    in its row: with one target language an epoch holds every pair once. The stream depends only on the arguments, and
    can start at any step at little cost.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        sources: Sequence[str] | None = None,
        targets: Sequence[str] = ("eng_Latn",),
        batch_tokens: int = 500,
        und_rate: float = 0.2,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        """Tokenize the training split.

        Args:
            corpus: its `train` table is read.
            tokenizer: needs a tag for every language of the corpus.
            sources: languages to translate from; None for all languages of the corpus.
            targets: languages to translate into.
            batch_tokens: the limit on pairs times tokens of the longest sentence, padding included; a longer pair is a
                batch of its own.
            und_rate: the share of sources whose language tag is replaced by `und`, so that the model learns to read
                text without being told its language.
            max_tokens: sentences with more tokens, tag and `</s>` included, are left out.
            seed: for the shuffling, the targets and the `und` tags.

        Raises:
            UnknownLanguageError: a source or target that the corpus lacks, or a language that the tokenizer lacks.
            ValueError: no pair is left.
        """
        # A language that is named twice counts once.
        sources = tuple(dict.fromkeys(corpus.languages if sources is None else sources))
        targets = tuple(dict.fromkeys(targets))
        require_languages([*sources, *targets], corpus.languages, "this corpus")
        require_languages(corpus.languages, tokenizer.languages, "this tokenizer")
        self.languages = corpus.languages
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.und_rate = und_rate
        self.seed = seed
        self.table = TokenTable.encode(corpus.train, tokenizer)
        self._targets = np.array([corpus.languages.index(target) for target in targets], dtype=np.int64)
        widths = self.table.lengths + 2
        usable = (widths > 2) & (widths <= (max_tokens or widths.max(initial=0)))
        self._usable = usable.reshape(len(corpus.train), len(corpus.languages))
        translated = np.isin(corpus.languages, sources)
        self._sources = np.flatnonzero(self._usable & translated & (self._targets_of_cells() > 0))
        if len(self._sources) == 0:
            raise ValueError(
                f"no sentence of the training split in {', '.join(sources)} has a translation into {', '.join(targets)}"
                + (f" within {max_tokens} tokens" if max_tokens else "")
            )

    @property
    def num_pairs(self) -> int:
        """The number of pairs in an epoch."""
        return len(self._sources)

    def digest(self) -> str:
        """The first characters of a SHA-256 of the sentences and of what their ids mean; it tells corpora apart."""
        parts = (self.tokenizer.to_json().encode(), self.table.tokens.tobytes(), self.table.starts.tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def stream(self, start: int = 0) -> Iterator[Batch]:
        """The batches from step `start` on, endlessly; `stream(k)` skips the first k batches of `stream(0)`."""
        epoch = 0
        while True:
            plan = self.plan(epoch)
            for b in plan.order[start:]:
                yield self._batch(plan, slice(plan.edges[b], plan.edges[b + 1]))
            start = max(0, start - len(plan.order))
            epoch += 1

    def plan(self, epoch: int) -> EpochPlan:
        """Draw the batches of an epoch; they depend only on the constructor's arguments and on `epoch`."""
        rng = np.random.default_rng([self.seed, epoch])
        sources = rng.permutation(self._sources)
        targets = self._draw_targets(sources, rng)
        undetermined = rng.random(len(sources)) < self.und_rate
        source_widths, target_widths = self.table.lengths[sources] + 2, self.table.lengths[targets] + 2
        widths = np.maximum(source_widths, target_widths)
        pool = np.arange(len(sources)) // POOL_PAIRS
        by_length = np.lexsort((source_widths + target_widths, widths, pool))
        edges = cut_batches(widths[by_length].tolist(), self.batch_tokens)
        order = rng.permutation(len(edges) - 1)
        return EpochPlan(sources[by_length], targets[by_length], undetermined[by_length], edges, order)

    def _targets_of_cells(self) -> NDArray[np.int64]:
        """[rows, languages]: the number of targets that each cell can be translated into."""
        in_row = self._usable[:, self._targets].sum(axis=1, keepdims=True)
        itself = np.zeros_like(self._usable)
        itself[:, self._targets] = self._usable[:, self._targets]
        counts: NDArray[np.int64] = in_row - itself
        return counts

    def _draw_targets(self, sources: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """A target cell for every source cell; all targets in its row are equally likely."""
        rows, columns = np.divmod(sources, len(self.languages))
        drawn = np.empty_like(columns)
        waiting = np.arange(len(sources))
        while len(waiting) > 0:  # every source has a target, so this ends
            guess = rng.choice(self._targets, size=len(waiting))
            good = self._usable[rows[waiting], guess] & (guess != columns[waiting])
            drawn[waiting[good]] = guess[good]
            waiting = waiting[~good]
        return rows * len(self.languages) + drawn

    def _batch(self, plan: EpochPlan, pairs: slice) -> Batch:
        sources, targets = plan.sources[pairs].tolist(), plan.targets[pairs].tolist()
        return collate(
            [self.table.cell(i) for i in sources],
            [self.table.cell(i) for i in targets],
            [self.languages[i % len(self.languages)] for i in sources],
            [self.languages[i % len(self.languages)] for i in targets],
            plan.undetermined[pairs].tolist(),
            self.tokenizer,
        )


def eval_batches(
    pairs: Sequence[SentencePair], tokenizer: Tokenizer, batch_tokens: int = 2000, undetermined: bool = False
) -> Iterator[Batch]:
    """Batches of the pairs, in their order; `batch_tokens` as in `PairBatches`.

    `undetermined` gives every source the tag `und` instead of its language.
    """
    sources = tokenizer.encode_pieces([pair.source for pair in pairs])
    targets = tokenizer.encode_pieces([pair.target for pair in pairs])
    widths = [max(len(source), len(target)) + 2 for source, target in zip(sources, targets, strict=True)]
    edges = cut_batches(widths, batch_tokens)
    for start, end in pairwise(edges):
        yield collate(
            sources[start:end],
            targets[start:end],
            [pair.source_language for pair in pairs[start:end]],
            [pair.target_language for pair in pairs[start:end]],
            [undetermined] * (end - start),
            tokenizer,
        )


def cut_batches(widths: Sequence[int], batch_tokens: int) -> list[int]:
    """Where to cut a sequence of sentences so that each batch, padded, has at most `batch_tokens` tokens.

    Returns the edges, 0 and `len(widths)` included. A sentence wider than `batch_tokens` is a batch of its own.
    """
    edges, widest = [0], 0
    for i, width in enumerate(widths):
        widest = max(widest, width)
        if widest * (i + 1 - edges[-1]) > batch_tokens and i > edges[-1]:
            edges.append(i)
            widest = width
    return [*edges, len(widths)] if widths else edges


def collate(
    sources: Sequence[Sequence[int] | NDArray[np.int32]],
    targets: Sequence[Sequence[int] | NDArray[np.int32]],
    source_languages: Sequence[str],
    target_languages: Sequence[str],
    undetermined: Sequence[bool],
    tokenizer: Tokenizer,
) -> Batch:
    """Frame B pairs of token lists with tags and `</s>`, and pad them on the right."""
    source_ids = np.full((len(sources), max(map(len, sources)) + 2), tokenizer.pad_id)
    labels = np.full((len(targets), max(map(len, targets)) + 2), tokenizer.pad_id)
    tags = [UNDETERMINED if und else code for code, und in zip(source_languages, undetermined, strict=True)]
    for ids, rows, languages in ((source_ids, sources, tags), (labels, targets, target_languages)):
        for i, (row, language) in enumerate(zip(rows, languages, strict=True)):
            ids[i, 0] = tokenizer.language_id(language)
            ids[i, 1 : len(row) + 1] = row
            ids[i, len(row) + 1] = tokenizer.eos_id
    decoder_input_ids = np.roll(labels, 1, axis=1)
    decoder_input_ids[:, 0] = tokenizer.eos_id
    # A shorter target's own </s> has moved right too: it predicts nothing and counts as padding.
    decoder_mask = labels != tokenizer.pad_id
    decoder_input_ids[~decoder_mask] = tokenizer.pad_id
    return Batch(
        source_ids=torch.from_numpy(source_ids),
        source_mask=torch.from_numpy((source_ids != tokenizer.pad_id).astype(np.int64)),
        decoder_input_ids=torch.from_numpy(decoder_input_ids),
        decoder_mask=torch.from_numpy(decoder_mask.astype(np.int64)),
        labels=torch.from_numpy(labels),
        source_languages=tuple(source_languages),
        target_languages=tuple(target_languages),
    )
