"""Text to token ids and back: byte-fallback BPE, with one control token per language, as in NLLB.

Ids, in order: `<s> <pad> </s> <unk>` as in NLLB, one tag per language, `und` for a source in an undetermined language
(its BCP 47 name), the 256 bytes, the most common characters, and the merges of BPE (Sennrich et al. 2016,
arXiv:1508.07909).

The BPE model does not know the control tokens: their ids are below its own. So a text that spells one out, such as
"</s>" or "fra_Latn", is only text, whatever the model was trained on.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeGuard

from tokenizers import Tokenizer as BPETokenizer
from tokenizers import models, pre_tokenizers, trainers

from moe_edu.data.languages import get_language, require_languages
from moe_edu.data.text import WORD_START, normalize_text

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
UNDETERMINED = "und"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
MAX_PIECE_CHARS = 16  # no piece is longer: whole phrases are not worth an id
ALPHABET_SHARE = 0.3  # of the vocabulary; rarer characters are written as bytes
FORMAT = "moe_edu tokenizer 1"


_WORD = re.compile(rf"{WORD_START}[^{WORD_START}\d]*|\d|[^{WORD_START}\d]+")


def split_words(text: str) -> list[str]:
    """Split the normalized text into the strings within which BPE merges: words, and every digit on its own.

    >>> split_words("1 août 1996")
    ['▁', '1', '▁août', '▁', '1', '9', '9', '6']
    """
    text = normalize_text(text)
    return _WORD.findall(WORD_START + text.replace(" ", WORD_START)) if text else []


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used."""


class Tokenizer:
    """Encodes sentences of the `languages` as lists of ids, and decodes ids to text.

    For every text and language, `decode(encode_source(text, language)) == normalize_text(text)`.
    """

    bos_id, pad_id, eos_id, unk_id = range(4)

    def __init__(
        self, languages: Sequence[str], pieces: Sequence[str], merges: Sequence[tuple[str, str]]
    ) -> None:
        """Build from the BPE's `pieces`, in the order of their ids with the bytes first, and its `merges`.

        Raises:
            ValueError: pieces and merges are inconsistent.
            UnknownLanguageError: a language is not one of FLORES-200's.
        """
        self.languages = tuple(languages)
        for language in self.languages:
            get_language(language)
        _check_parts(self.languages, pieces, merges)
        self._controls = (*SPECIALS, *self.languages, UNDETERMINED)
        self._pieces = tuple(pieces)
        self._merges = tuple(merges)
        self._language_ids = {tag: i for i, tag in enumerate(self._controls) if i >= len(SPECIALS)}
        ids = {piece: i for i, piece in enumerate(pieces, start=len(self._controls))}
        self._bpe = BPETokenizer(models.BPE(vocab=ids, merges=list(merges), byte_fallback=True))
        self._piece_bytes = [bytes([i]) for i in range(256)]
        self._piece_bytes += [piece.replace(WORD_START, " ").encode() for piece in pieces[256:]]

    @classmethod
    def train(cls, texts: Iterable[str], languages: Sequence[str], vocab_size: int = 3000) -> Tokenizer:
        """Learn the pieces from `texts`, which should be those of the training split only.

        The result depends only on how often each text occurs. It has at most `vocab_size` ids, fewer if
        the texts have too few pairs that occur twice.

        Raises:
            ValueError: `vocab_size` leaves no room for pieces after the tags and the 256 bytes.
        """
        room = vocab_size - len(SPECIALS) - len(languages) - 1 - len(BYTES)
        if room < 1:
            raise ValueError(
                f"vocab_size {vocab_size} is too small for {len(languages)} languages: "
                f"tags and bytes alone take {vocab_size - room}"
            )
        words = ["\n".join(split_words(text)) for text in texts]
        alphabet = _choose_alphabet(words, min(room, int(ALPHABET_SHARE * vocab_size)))
        # The trainer would drop an unknown character and so make its neighbours adjacent: split there.
        cuts = {ord(char): "\n" for char in set(chain.from_iterable(words)).difference(alphabet)}
        learner = BPETokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
        trainer = trainers.BpeTrainer(
            vocab_size=room,
            min_frequency=2,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            max_token_length=MAX_PIECE_CHARS,
            show_progress=False,
        )
        learner.train_from_iterator((line.translate(cuts) for line in words), trainer)
        model = json.loads(learner.to_str())["model"]
        pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
        return cls(languages, (*BYTES, *pieces), [(left, right) for left, right in model["merges"]])

    def __len__(self) -> int:
        """The number of ids: special tokens, tags and pieces."""
        return len(self._controls) + len(self._pieces)

    def language_id(self, language: str) -> int:
        """The id of a language's tag, or of `und`."""
        if language not in self._language_ids:
            require_languages([language], self.languages, "this tokenizer")
        return self._language_ids[language]

    def encode_source(self, text: str, language: str = UNDETERMINED) -> list[int]:
        """`[language] tokens </s>`, what the encoder reads."""
        return self._framed(self.encode_pieces([text])[0], language)

    def encode_target(self, text: str, language: str) -> list[int]:
        """`[language] tokens </s>`, what the decoder should write; its input is this shifted right, after `</s>`."""
        return self._framed(self.encode_pieces([text])[0], language)

    def encode_source_batch(
        self, texts: Sequence[str], languages: str | Sequence[str] = UNDETERMINED
    ) -> list[list[int]]:
        """`encode_source` of every text, all in one language or with one language each."""
        return self._framed_batch(texts, languages)

    def encode_target_batch(self, texts: Sequence[str], languages: str | Sequence[str]) -> list[list[int]]:
        """`encode_target` of every text, all in one language or with one language each."""
        return self._framed_batch(texts, languages)

    def encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of every text, without tag and `</s>`."""
        texts_words = [split_words(text) for text in texts]
        # Most sentences consist of the same few words: encode each word once.
        words = list(dict.fromkeys(chain.from_iterable(texts_words)))
        ids = {w: e.ids for w, e in zip(words, self._bpe.encode_batch_fast(words), strict=True)}
        return [list(chain.from_iterable(map(ids.__getitem__, split))) for split in texts_words]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens and tags are left out, and bytes that are not UTF-8 give U+FFFD.

        Raises:
            ValueError: an id that the tokenizer does not have.
        """
        first = len(self._controls)
        pieces = (self._piece_bytes[i - first] for i in map(self._checked, ids) if i >= first)
        return b"".join(pieces).decode("utf-8", errors="replace").removeprefix(" ")

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """A readable form of each id: `fra_Latn`, `▁août` (`▁` starts a word), `<0xE2>` (a byte), `</s>`."""
        names = self._controls + self._pieces
        return [names[self._checked(i)] for i in ids]

    def to_json(self) -> str:
        parts = {
            "format": FORMAT,
            "languages": self.languages,
            "pieces": self._pieces,
            "merges": self._merges,
        }
        return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer as JSON; an existing file stays intact if writing fails."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a tokenizer that `save` wrote.

        Raises:
            TokenizerError: the file is missing, damaged, or not a tokenizer.
        """
        try:
            parts = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(parts, dict) or parts.get("format") != FORMAT:
                raise ValueError(f'it does not say "format": "{FORMAT}"')
            languages, pieces, merges = (parts.get(key) for key in ("languages", "pieces", "merges"))
            if not (_is_strings(languages) and _is_strings(pieces) and isinstance(merges, list)):
                raise ValueError("languages, pieces and merges must be lists of text")
            if not all(_is_strings(merge) and len(merge) == 2 for merge in merges):
                raise ValueError("every merge must be a pair of pieces")
            return cls(languages, pieces, [(left, right) for left, right in merges])
        except OSError as error:
            raise TokenizerError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise TokenizerError(
                f"{path} is not a moe_edu tokenizer, or is damaged: {error}; copy it from the model's folder "
                "again, or retrain"
            ) from error

    def _framed(self, pieces: list[int], language: str) -> list[int]:
        return [self.language_id(language), *pieces, self.eos_id]

    def _framed_batch(self, texts: Sequence[str], languages: str | Sequence[str]) -> list[list[int]]:
        tags = [languages] * len(texts) if isinstance(languages, str) else languages
        encoded = zip(self.encode_pieces(texts), tags, strict=True)
        return [self._framed(pieces, tag) for pieces, tag in encoded]

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise ValueError(f"token id {i} is outside this tokenizer's 0 to {len(self) - 1}")
        return int(i)


def _choose_alphabet(lines: Iterable[str], size: int) -> list[str]:
    """`▁`, which decoding needs, and the most common characters that occur at least twice, at most `size` in all.

    The BPE trainer can choose too, but breaks ties by hash order, so its choice varies from run to run.
    """
    counts = Counter(chain.from_iterable(lines))
    del counts["\n"]  # between the words
    counts[WORD_START] = 0
    common = sorted((-count, char) for char, count in counts.items() if count > 1)
    return [WORD_START, *(char for _, char in common)][:size]


def _check_parts(languages: Sequence[str], pieces: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
    known = set(pieces)
    if len(set(languages)) < len(languages):
        raise ValueError("a language is named twice")
    if tuple(pieces[:256]) != BYTES or len(known) < len(pieces) or WORD_START not in known:
        raise ValueError(f"the pieces must begin with the 256 bytes, include {WORD_START}, and be unique")
    for left, right in merges:
        if not {left, right, left + right} <= known:
            raise ValueError(f"the merge of {left!r} and {right!r} is not among the pieces")


def _is_strings(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
