"""The corpus: aligned sentences in many languages, split so that no test sentence is seen in training.

The one that ships, `files/corpus.tsv.xz`, is a tab-separated table with one meaning per row: `split`, `kind`, then one
column per language, named by its FLORES-200 code. `moe_edu.data.build` makes it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

from moe_edu.data.languages import require_languages
from moe_edu.data.shipped import read_shipped, unpack_checked
from moe_edu.data.splits import SPLITS

CORPUS_FILE = "corpus.tsv.xz"
CHECKSUM_FILE = "corpus.tsv.xz.sha256"  # as `sha256sum` writes it


class SentencePair(NamedTuple):
    """A sentence and its translation, with the fields that reports group by."""

    source: str
    target: str
    source_language: str
    target_language: str
    kind: str


@dataclass(frozen=True)
class Table:
    """Aligned sentences: `rows[i][j]` says meaning `i` in `languages[j]`, or is None if it is missing.

    `kinds[i]` is the type of sentence of row `i`, such as "date".
    """

    languages: tuple[str, ...]
    kinds: tuple[str, ...]
    rows: tuple[tuple[str | None, ...], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, language: str) -> tuple[str | None, ...]:
        """All sentences of one language, in the order of the rows."""
        require_languages([language], self.languages, "this corpus")
        j = self.languages.index(language)
        return tuple(row[j] for row in self.rows)

    def texts(self) -> Iterator[str]:
        """Every sentence of every language, row by row."""
        return (text for row in self.rows for text in row if text is not None)

    def restrict(self, languages: Sequence[str]) -> Table:
        """The same rows with only these languages, in this order."""
        columns = [self.languages.index(language) for language in languages]
        rows = tuple(tuple(row[j] for j in columns) for row in self.rows)
        return Table(tuple(languages), self.kinds, rows)


@dataclass(frozen=True)
class Corpus:
    """A train, a valid and a test `Table` in the same `languages`."""

    name: str
    languages: tuple[str, ...]
    train: Table
    valid: Table
    test: Table

    def split(self, name: str) -> Table:
        """The table called "train", "valid" or "test"."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; the splits are {', '.join(SPLITS)}")
        table: Table = getattr(self, name)
        return table

    def pairs(self, split: str, source: str, target: str) -> list[tuple[str, str]]:
        """(sentence, translation) of every row of the split that has both languages."""
        return [(p.source, p.target) for p in self.sentence_pairs(split, [source], [target])]

    def sentence_pairs(
        self, split: str, sources: Sequence[str] | None = None, targets: Sequence[str] = ("eng_Latn",)
    ) -> list[SentencePair]:
        """Every pair of the split from one of `sources` (default: all languages) into a different one of `targets`.

        Ordered by row, then by source, then by target.
        """
        table = self.split(split)
        sources = self.languages if sources is None else sources
        require_languages([*sources, *targets], self.languages, "this corpus")
        column = {language: j for j, language in enumerate(self.languages)}
        directions = [(s, t, column[s], column[t]) for s in sources for t in targets if s != t]
        return [
            SentencePair(text, translation, s, t, kind)
            for kind, row in zip(table.kinds, table.rows, strict=True)
            for s, t, i, j in directions
            if (text := row[i]) is not None and (translation := row[j]) is not None
        ]

    def restrict(self, languages: Sequence[str]) -> Corpus:
        """The same corpus with only these languages, in this order.

        Raises:
            UnknownLanguageError: the corpus lacks one of them.
            ValueError: a language is named twice, or fewer than two are.
        """
        require_languages(languages, self.languages, "this corpus")
        if len(set(languages)) < len(languages) or len(languages) < 2:
            raise ValueError(f"name at least two languages, each once, not {', '.join(languages) or 'none'}")
        tables = [self.split(name).restrict(languages) for name in SPLITS]
        return Corpus(self.name, tuple(languages), *tables)


def choose_phrases(
    corpus: Corpus,
    languages: Sequence[str],
    kinds: Sequence[str],
    *,
    split: str = "valid",
    target: str = "eng_Latn",
    seed: int = 0,
) -> list[SentencePair]:
    """One random sentence of each of `kinds` from a split, taking the languages in turn.

    Raises:
        ValueError: the split has no sentence of a kind in its language.
    """
    rng = random.Random(seed)
    chosen = []
    for kind, language in zip(kinds, cycle(languages), strict=False):
        pairs = [pair for pair in corpus.sentence_pairs(split, [language], [target]) if pair.kind == kind]
        if not pairs:
            raise ValueError(
                f"the {split} split has no {kind!r} in {language}; its kinds are {set(corpus.split(split).kinds)}"
            )
        chosen.append(rng.choice(pairs))
    return chosen


def load_corpus(languages: Sequence[str] | None = None) -> Corpus:
    """Load the corpus that ships with the package, in all its languages or only in `languages`.

    Raises:
        CorpusError: the file is missing, or not the one that was shipped.
        UnknownLanguageError: the corpus lacks a language.
    """
    corpus = parse_shipped(*read_shipped(CORPUS_FILE, CHECKSUM_FILE))
    return corpus if languages is None else corpus.restrict(languages)


def parse_shipped(compressed: bytes, checksum: str) -> Corpus:
    """Check the bytes of a corpus file against its `sha256sum` line, and read them."""
    header, *lines = unpack_checked(compressed, checksum, CORPUS_FILE, "moe_edu.data.build")
    languages = tuple(header.split("\t")[2:])
    return make_corpus("CLDR", languages, [line.split("\t") for line in lines])


def make_corpus(name: str, languages: tuple[str, ...], rows: Sequence[Sequence[str]]) -> Corpus:
    """Build a corpus of rows `[split, kind, text, ...]`; an empty text is a missing one."""
    tables = []
    for split in SPLITS:
        chosen = [row for row in rows if row[0] == split]
        texts = tuple(tuple(text or None for text in row[2:]) for row in chosen)
        tables.append(Table(languages, tuple(row[1] for row in chosen), texts))
    return Corpus(name, languages, *tables)
