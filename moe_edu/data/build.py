"""Rebuild the shipped corpus, bit for bit, from the translations of CLDR: `python -m moe_edu.data.build [folder]`.

CLDR comes with Babel, whose version is fixed below: other versions hold other translations.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import lzma
import sys
from pathlib import Path
from random import Random

from moe_edu.data.corpus import CHECKSUM_FILE, CORPUS_FILE
from moe_edu.data.splits import assign_splits

BABEL_VERSION = "2.18.0"  # CLDR 47
SEED = 1996
HELD_OUT = {"valid": 0.05, "test": 0.05}


def require_babel() -> None:
    """Raise `RuntimeError` unless the version of Babel that gives this corpus is installed."""
    try:
        found = importlib.metadata.version("babel")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != BABEL_VERSION:
        raise RuntimeError(
            f"the corpus needs Babel {BABEL_VERSION}, but the installed version is {found}; "
            f"run: pip install babel=={BABEL_VERSION}"
        )


def build_table() -> str:
    """Render the corpus as tab-separated text, one meaning per line, always in the same order."""
    require_babel()
    from babel import Locale

    from moe_edu.data import cldr

    rng = Random(SEED)
    locales = [Locale.parse(locale) for locale in cldr.LOCALES.values()]
    meanings = cldr.sample_meanings(rng)
    rows = [[cldr.say(meaning, locale) for locale in locales] for meaning in meanings]
    splits = assign_splits(rows, HELD_OUT, rng)
    assert splits is not None, "thousands of meanings cannot all share a string"

    lines = ["\t".join(("split", "kind", *cldr.LOCALES))]
    for split, meaning, row in zip(splits, meanings, rows, strict=True):
        lines.append("\t".join((split, meaning.kind, *(text or "" for text in row))))
    return "".join(line + "\n" for line in lines)


def compress_table(table: str) -> bytes:
    """Compress with fixed settings: the same text gives the same bytes with the same liblzma."""
    return lzma.compress(table.encode("utf-8"), preset=6)  # higher presets take longer and save nothing here


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0]) if arguments else Path(__file__).parent / "files"
    compressed = compress_table(build_table())
    digest = hashlib.sha256(compressed).hexdigest()
    (folder / CORPUS_FILE).write_bytes(compressed)
    (folder / CHECKSUM_FILE).write_text(f"{digest}  {CORPUS_FILE}\n", encoding="ascii")
    print(f"{folder / CORPUS_FILE}: {len(compressed):,} bytes, SHA-256 {digest}")


if __name__ == "__main__":
    main(sys.argv[1:])
