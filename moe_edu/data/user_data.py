"""Your own translations: a folder in the layout of FLORES-200, or a tab-separated table.

Nothing is half-read: you get either a whole `Corpus` or a `CorpusError` with file, line and fix. Files are UTF-8;
a byte order mark at the start is allowed. Every sentence goes through `normalize_text`.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from pathlib import Path
from random import Random

from moe_edu.data.corpus import Corpus, Table, make_corpus
from moe_edu.data.languages import UnknownLanguageError, get_language
from moe_edu.data.shipped import CorpusError
from moe_edu.data.splits import SPLITS, assign_splits
from moe_edu.data.text import normalize_text

MAX_FILE_BYTES = 512 * 2**20
MAX_SENTENCE_CHARS = 5_000
VALID_EVERY = 10  # every tenth of FLORES's dev lines is for validation
HELD_OUT = {"valid": 0.05, "test": 0.05}  # shares of a table that does not name its splits
DEFAULT_KIND = "sentence"


def read_corpus(path: str | os.PathLike[str]) -> Corpus:
    """Read a folder with `read_flores`, or a file with `read_tsv`."""
    return read_flores(path) if Path(path).is_dir() else read_tsv(path)


def read_flores(folder: str | os.PathLike[str]) -> Corpus:
    """Read a folder in FLORES-200's layout: `dev/eng_Latn.dev`, `devtest/eng_Latn.devtest`, one sentence per line.

    Line i of every file of a split has the same meaning. In `dev` every tenth line, starting with the first, is for
    validation and the others are for training; `devtest` is the test. An empty line is a missing sentence. Every kind
    is "sentence".

    Raises:
        CorpusError: a file is missing, is not text, has a language code that is not FLORES-200's, or a different
            number of lines than the first file.
    """
    folder = Path(folder)
    languages = _flores_languages(folder / "dev", ".dev")
    tested = _flores_languages(folder / "devtest", ".devtest")
    if languages != tested:
        lone = min(set(languages) ^ set(tested))
        raise CorpusError(
            f"{folder}: {lone} is only in {'dev' if lone in languages else 'devtest'}; it must be in both"
        )
    dev = _read_aligned([folder / "dev" / f"{language}.dev" for language in languages])
    test = _read_aligned([folder / "devtest" / f"{language}.devtest" for language in languages])
    if len(dev) < 2:
        raise CorpusError(f"{folder / 'dev'}: one line cannot be split into train and valid; add more")
    train = [row for i, row in enumerate(dev) if i % VALID_EVERY]
    valid = dev[::VALID_EVERY]
    tables = [Table(languages, (DEFAULT_KIND,) * len(rows), tuple(rows)) for rows in (train, valid, test)]
    return Corpus(folder.resolve().name, languages, *tables)


def read_tsv(path: str | os.PathLike[str]) -> Corpus:
    """Read a tab-separated table whose header names the columns: FLORES-200 codes and, optionally, `split` and `kind`.

    A row is one meaning in every language; an empty cell is a missing sentence. There is no quoting: a sentence has
    no tab and no line break. `split` is train, valid or test; without that column, valid and test each get a twentieth
    of the rows, always the same ones, chosen so that no sentence is in two splits. `kind` is any short label that
    reports should group by.

    Raises:
        CorpusError: the file is missing or not text; a column is unknown or repeated; a row has a different number of
            cells than the header, no sentence, or an unknown split; a split would be empty.
    """
    path = Path(path)
    header, *lines = _read_lines(path)
    columns = header.split("\t")
    languages = _language_columns(path, columns)
    text_columns = [columns.index(language) for language in languages]
    rows: list[list[str]] = []
    for number, line in enumerate(lines, start=2):
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise CorpusError(
                f"{path}:{number}: {len(cells)} cells, but the header has {len(columns)} columns"
            )
        texts = [_sentence(path, number, cells[j]) for j in text_columns]
        if not any(texts):
            raise CorpusError(f"{path}:{number}: no sentence in any language; remove the line")
        kind = _sentence(path, number, cells[columns.index("kind")]) if "kind" in columns else ""
        split = cells[columns.index("split")] if "split" in columns else ""
        if "split" in columns and split not in SPLITS:
            raise CorpusError(f"{path}:{number}: unknown split {split[:20]!r}; use {', '.join(SPLITS)}")
        rows.append([split, kind or DEFAULT_KIND, *texts])
    if "split" not in columns:
        _assign_splits(path, rows)
    missing = [split for split in SPLITS if split not in {row[0] for row in rows}]
    if missing:
        raise CorpusError(
            f"{path}: the split {missing[0]} has no rows; add some, or leave out the column `split`"
        )
    return make_corpus(path.stem, languages, rows)


def _assign_splits(path: Path, rows: list[list[str]]) -> None:
    """Fill in the first cell of every row."""
    splits = assign_splits([[text or None for text in row[2:]] for row in rows], HELD_OUT, Random(0))
    if splits is None:
        raise CorpusError(
            f"{path}: fewer than three rows that share no sentence, so train, valid and test cannot be separated; "
            "add rows, or a column `split`"
        )
    for row, split in zip(rows, splits, strict=True):
        row[0] = split


def _language_columns(path: Path, columns: Sequence[str]) -> tuple[str, ...]:
    """The language codes of a header, which must be known, unique and at least two."""
    for column in columns:
        if columns.count(column) > 1:
            raise CorpusError(f"{path}:1: the column {column[:40]!r} is repeated")
    languages = tuple(column for column in columns if column not in ("split", "kind"))
    for language in languages:
        try:
            get_language(language)
        except UnknownLanguageError as error:
            raise CorpusError(f"{path}:1: {str(error)[:500]}") from error
    if len(languages) < 2:
        raise CorpusError(
            f"{path}:1: a translation needs columns of two languages, such as eng_Latn and fra_Latn"
        )
    return languages


def _flores_languages(folder: Path, suffix: str) -> tuple[str, ...]:
    """The codes of the files `<code><suffix>`, in order; other files are ignored."""
    try:
        files = [path for path in folder.iterdir() if path.suffix == suffix and not path.name.startswith(".")]
        languages = tuple(sorted(path.stem for path in files))
    except OSError as error:
        raise CorpusError(
            f"{folder}: cannot be read ({error.strerror}); a FLORES-200 folder has dev and devtest"
        ) from error
    if len(languages) < 2:
        raise CorpusError(
            f"{folder}: needs files of two languages, such as eng_Latn{suffix} and fra_Latn{suffix}"
        )
    for language in languages:
        try:
            get_language(language)
        except UnknownLanguageError as error:
            raise CorpusError(f"{folder / (language + suffix)}: {error}") from error
    return languages


def _read_aligned(paths: Sequence[Path]) -> list[tuple[str | None, ...]]:
    """Line i of all files as row i."""
    columns: list[list[str | None]] = []
    for path in paths:
        lines = _read_lines(path)
        if columns and len(lines) != len(columns[0]):
            raise CorpusError(f"{path}: {len(lines)} lines, but {paths[0].name} has {len(columns[0])}")
        columns.append([_sentence(path, number, line) or None for number, line in enumerate(lines, start=1)])
    rows = list(zip(*columns, strict=True))
    for number, row in enumerate(rows, start=1):
        if not any(row):
            raise CorpusError(
                f"{paths[0]}:{number}: no sentence in any language; remove the line from every file"
            )
    return rows


def _read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, at least one; both `\\n` and `\\r\\n` end a line."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_FILE_BYTES:
        raise CorpusError(f"{path}: larger than {MAX_FILE_BYTES // 2**20} MiB; use a part of it")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CorpusError(f"{path}:1: this is UTF-16; save it as UTF-8")
    if (nul := data.find(b"\0")) >= 0:
        raise CorpusError(f"{path}:{_line_number(data, nul)}: a NUL byte; this is not a text file")
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        # `error.object` lacks the byte order mark, which does not change line numbers.
        raise CorpusError(
            f"{path}:{_line_number(error.object, error.start)}: not UTF-8 "
            f"(byte 0x{error.object[error.start]:02X}); save the file as UTF-8"
        ) from error
    lines = text.removesuffix("\n").split("\n")
    if lines == [""]:
        raise CorpusError(f"{path}: the file is empty")
    return [line.removesuffix("\r") for line in lines]


def _line_number(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _sentence(path: Path, number: int, text: str) -> str:
    if len(text) > MAX_SENTENCE_CHARS:
        raise CorpusError(
            f"{path}:{number}: a sentence of {len(text):,} characters; at most {MAX_SENTENCE_CHARS:,} are allowed"
        )
    return normalize_text(text)
