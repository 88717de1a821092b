"""A pocket dictionary: the names of 400 things in 63 languages, as people wrote them for CLDR's emoji.

The one that ships, `files/dictionary.tsv.xz`, is a tab-separated table with one concept per row: its emoji, then its
name in each language, in columns named by FLORES-200 code. `moe_edu.data.dictionary_build` makes it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from moe_edu.data.shipped import read_shipped, unpack_checked
from moe_edu.data.splits import SPLITS

DICTIONARY_FILE = "dictionary.tsv.xz"
DICTIONARY_CHECKSUM_FILE = "dictionary.tsv.xz.sha256"  # as `sha256sum` writes it
HELD_OUT_SHARE = 0.05  # of the cells, in `valid` and in `test` each


class Entry(NamedTuple):
    """One cell of the table: `name` is what `language` calls concept number `concept`."""

    concept: int
    language: str
    name: str


@dataclass(frozen=True)
class Dictionary:
    """The table, and its cells divided into splits.

    Attributes:
        concepts: the English names in order, one per row.
        emoji: the picture of each concept.
        languages: FLORES-200 codes, English among them.
        train, valid, test: the cells, row by row. A cell is in one split only. Its *spelling* may be in another split
            under another language ("pizza" is a word nearly everywhere), which is how a held-out name can be guessed.
    """

    concepts: tuple[str, ...]
    emoji: tuple[str, ...]
    languages: tuple[str, ...]
    train: tuple[Entry, ...]
    valid: tuple[Entry, ...]
    test: tuple[Entry, ...]

    def split(self, name: str) -> tuple[Entry, ...]:
        """The cells called "train", "valid" or "test"."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; the splits are {', '.join(SPLITS)}")
        entries: tuple[Entry, ...] = getattr(self, name)
        return entries


def split_of(concept: str, language: str) -> str:
    """The split of one cell, drawn by the SHA-256 of its name, so that it depends on no other cell and on no order."""
    digest = hashlib.sha256(f"{concept}\t{language}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw < HELD_OUT_SHARE:
        return "valid"
    return "test" if draw < 2 * HELD_OUT_SHARE else "train"


@cache
def load_dictionary() -> Dictionary:
    """Load the dictionary that ships with the package.

    Raises:
        CorpusError: a file is missing, or not the one that was shipped.
    """
    return parse_dictionary(*read_shipped(DICTIONARY_FILE, DICTIONARY_CHECKSUM_FILE))


def parse_dictionary(compressed: bytes, checksum: str) -> Dictionary:
    """Check the bytes of a dictionary file against its `sha256sum` line, and read them.

    Raises:
        CorpusError: the bytes do not match the checksum.
    """
    header, *lines = unpack_checked(compressed, checksum, DICTIONARY_FILE, "moe_edu.data.dictionary_build")
    languages = tuple(header.split("\t")[1:])
    rows = [line.split("\t") for line in lines]
    english = 1 + languages.index("eng_Latn")
    cells: dict[str, list[Entry]] = {name: [] for name in SPLITS}
    for concept, row in enumerate(rows):
        for language, name in zip(languages, row[1:], strict=True):
            if name:
                cells[split_of(row[english], language)].append(Entry(concept, language, name))
    return Dictionary(
        concepts=tuple(row[english] for row in rows),
        emoji=tuple(row[0] for row in rows),
        languages=languages,
        **{name: tuple(entries) for name, entries in cells.items()},
    )
