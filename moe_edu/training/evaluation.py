"""How good translations are: chrF++ and exact match, for all sentences and by language and kind."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sacrebleu.metrics import CHRF

from moe_edu.data import Corpus, SentencePair
from moe_edu.model.pretrained import TextTranslator

# A translation may always have this many tokens, however short its reference; a longer one is wrong in any case.
_FEWEST_TOKENS = 96
_BATCH_SIZE = 256


@dataclass(frozen=True)
class Score:
    """Corpus-level scores.

    Attributes:
        chrf: chrF++ from 0 to 100 (Popović 2017: character order 6, word order 2).
        exact_match: share of translations that equal the reference, 0 to 1.
        sentences: how many were scored.
    """

    chrf: float
    exact_match: float
    sentences: int


@dataclass(frozen=True)
class Evaluation:
    """Scores over all examples, and over those of each source language, target language and kind."""

    overall: Score
    by_source_language: dict[str, Score]
    by_target_language: dict[str, Score]
    by_kind: dict[str, Score]

    def to_json(self) -> dict[str, Any]:
        """The overall numbers at the top, the others below, for `result.json`."""
        fields = asdict(self)
        return {**fields.pop("overall"), **fields}


def score(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Score translations against one reference each; no sentences score 0."""
    if not references:
        return Score(0.0, 0.0, 0)
    matches = sum(h == r for h, r in zip(hypotheses, references, strict=True))
    chrf = CHRF(word_order=2).corpus_score(list(hypotheses), [list(references)]).score
    return Score(chrf, matches / len(references), len(references))


def sample_examples(
    corpus: Corpus,
    split: str,
    targets: Sequence[str],
    count: int | None = None,
    seed: int = 0,
    sources: Sequence[str] | None = None,
) -> list[SentencePair]:
    """The pairs of `split` from one of `sources` (default: all languages) into a different one of `targets`.

    Returns all of them, or `count` drawn at random.
    """
    examples = corpus.sentence_pairs(split, sources, targets)
    if count is None or count >= len(examples):
        return examples
    return random.Random(seed).sample(examples, count)


def translate_examples(
    translator: TextTranslator,
    examples: Sequence[SentencePair],
    *,
    num_beams: int = 1,
) -> list[str]:
    """Translate all examples, in batches of one target language and similar length.

    A translation may be as long as its reference. `num_beams` is 1 for greedy search.
    """
    positions = translator.model.config.max_position_embeddings
    results = [""] * len(examples)
    by_length = sorted(
        range(len(examples)), key=lambda i: (examples[i].target_language, len(examples[i].source.encode()))
    )
    start = 0
    while start < len(by_length):
        target = examples[by_length[start]].target_language
        batch = [i for i in by_length[start : start + _BATCH_SIZE] if examples[i].target_language == target]
        references = translator.tokenizer.encode_pieces([examples[i].target for i in batch])
        longest = max(_FEWEST_TOKENS, *(len(reference) + 2 for reference in references))
        translations = translator.translate_batch(
            [examples[i].source for i in batch],
            target=target,
            source=[examples[i].source_language for i in batch],
            num_beams=num_beams,
            max_new_tokens=min(longest, positions),
        )
        for i, translation in zip(batch, translations, strict=True):
            results[i] = translation
        start += len(batch)
    return results


def evaluate(
    translator: TextTranslator, examples: Sequence[SentencePair], *, num_beams: int = 1
) -> Evaluation:
    """Translate and score; arguments as in `translate_examples`."""
    return score_examples(examples, translate_examples(translator, examples, num_beams=num_beams))


def score_examples(examples: Sequence[SentencePair], hypotheses: Sequence[str]) -> Evaluation:
    """Score `hypotheses[i]` as the translation of `examples[i]`."""
    pairs = list(zip(examples, hypotheses, strict=True))
    return Evaluation(
        overall=_score_pairs(pairs),
        by_source_language=_grouped(pairs, lambda example: example.source_language),
        by_target_language=_grouped(pairs, lambda example: example.target_language),
        by_kind=_grouped(pairs, lambda example: example.kind),
    )


def _score_pairs(pairs: Iterable[tuple[SentencePair, str]]) -> Score:
    pairs = list(pairs)
    return score([hypothesis for _, hypothesis in pairs], [example.target for example, _ in pairs])


def _grouped(
    pairs: Sequence[tuple[SentencePair, str]], key: Callable[[SentencePair], str]
) -> dict[str, Score]:
    groups = defaultdict(list)
    for example, hypothesis in pairs:
        groups[key(example)].append((example, hypothesis))
    return {name: _score_pairs(groups[name]) for name in sorted(groups)}
