"""One spelling for every sentence, whether from the corpus, for the tokenizer, or typed by a reader."""

from __future__ import annotations

import unicodedata

WORD_START = "▁"  # SentencePiece's mark for the start of a word; the tokenizer replaces spaces by it


def _replacements() -> dict[int, str | None]:
    """Code points that `normalize_text` replaces (a string) or removes (None).

    * Control characters and SentencePiece's own `▁` become spaces.
    * Marks that only control the display are removed: CLDR puts bidi controls and byte order marks around numbers.
      U+200C and U+200D stay, since Persian and the Indic scripts use them in spelling.
    * Lone surrogates are not text, and UTF-8 cannot hold them: they become U+FFFD.
    """
    controls = [code for code in range(0xA0) if unicodedata.category(chr(code)) == "Cc"]
    invisible = [0x00AD, 0x061C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060]
    invisible += [*range(0x2066, 0x206A), 0xFEFF]
    return {
        **dict.fromkeys([*controls, ord(WORD_START)], " "),
        **dict.fromkeys(invisible, None),
        **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
    }


_REPLACEMENTS = _replacements()


def normalize_text(text: str) -> str:
    """Return `text` in NFC, with single plain spaces between words and none at the ends.

    No-break, narrow and line-breaking spaces become plain ones; bidi and other invisible display controls
    and byte order marks are removed. Accepts any string, and is idempotent: `normalize_text(normalize_text(t)) ==
    normalize_text(t)`.
    """
    if not text.isascii() or not text.isprintable():
        # Removing a mark can bring together two characters that compose, so NFC comes last.
        text = unicodedata.normalize("NFC", text.translate(_REPLACEMENTS))
    return " ".join(text.split())
