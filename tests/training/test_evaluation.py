"""chrF++ and exact match, compared with sacrebleu and with cases that can be counted by hand."""

from dataclasses import replace

import pytest
from sacrebleu.metrics import CHRF

from moe_edu.data import SentencePair, load_corpus
from moe_edu.model.pretrained import load_pretrained
from moe_edu.training.evaluation import sample_examples, score, score_examples, translate_examples


def pair(source_language, kind, target):
    return SentencePair("x", target, source_language, "eng_Latn", kind)


def test_perfect_translations_score_100():
    result = score(["in 3 days", "1 August"], ["in 3 days", "1 August"])
    assert result.chrf == pytest.approx(100)
    assert result.exact_match == 1
    assert result.sentences == 2


def test_agrees_with_sacrebleus_chrf_plus_plus():
    hypotheses, references = ["in 3 day", "2 August"], ["in 3 days", "1 August"]
    expected = CHRF(word_order=2).corpus_score(hypotheses, [references]).score
    assert score(hypotheses, references).chrf == expected
    assert score(hypotheses, references).exact_match == 0


def test_a_translation_may_be_as_long_as_its_reference(monkeypatch):
    translator = load_pretrained()
    longest = []

    def generate(ids, mask, *, max_new_tokens, **_):
        longest.append(max_new_tokens)
        return ids

    examples = [SentencePair("a", target, "fra_Latn", "eng_Latn", "date") for target in ("a", "a 1 " * 45)]
    for example in examples:
        translate_examples(replace(translator, generate=generate), [example])
    needed = 2 + len(translator.tokenizer.encode_pieces([examples[1].target])[0])
    assert longest == [96, needed]
    assert 96 < needed <= translator.model.config.max_position_embeddings


def test_nothing_scores_zero():
    assert score([], []).sentences == 0


def test_groups_by_language_and_kind():
    examples = [pair("fra_Latn", "date", "a"), pair("fra_Latn", "unit", "b"), pair("deu_Latn", "date", "c")]
    result = score_examples(examples, ["a", "wrong", "c"])
    assert result.overall.exact_match == pytest.approx(2 / 3)
    assert {code: s.exact_match for code, s in result.by_source_language.items()} == {
        "deu_Latn": 1,
        "fra_Latn": 0.5,
    }
    assert {kind: s.sentences for kind, s in result.by_kind.items()} == {"date": 2, "unit": 1}
    assert result.to_json()["exact_match"] == result.overall.exact_match


def test_samples_repeat_and_come_from_the_split():
    corpus = load_corpus(["eng_Latn", "fra_Latn", "hin_Deva"])
    everything = sample_examples(corpus, "test", ["eng_Latn"])
    drawn = sample_examples(corpus, "test", ["eng_Latn"], 20, seed=4)
    assert drawn == sample_examples(corpus, "test", ["eng_Latn"], 20, seed=4)
    assert set(drawn) <= set(everything)
    assert len(set(drawn)) == 20
