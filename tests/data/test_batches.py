from collections import Counter
from itertools import chain, islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_edu.data import PairBatches, Tokenizer, UnknownLanguageError, eval_batches, load_corpus
from moe_edu.data.batches import cut_batches
from moe_edu.data.corpus import make_corpus

LANGUAGES = ("eng_Latn", "fra_Latn", "jpn_Jpan", "arb_Arab")


@pytest.fixture(scope="module")
def corpus():
    """A small corpus of real sentences, every seventh of which is missing."""
    source = load_corpus(LANGUAGES)
    rows = [
        [split, kind, *("" if (5 * i + j) % 7 == 0 else text for j, text in enumerate(row))]
        for split, table in (("train", source.valid), ("valid", source.test), ("test", source.test))
        for i, (kind, row) in enumerate(zip(table.kinds, table.rows, strict=True))
    ]
    return make_corpus("small", LANGUAGES, rows)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return Tokenizer.train(corpus.train.texts(), LANGUAGES, vocab_size=700)


def read_back(batch, tokenizer):
    """(source, target, source language, target language, source tag) of every row."""
    return [
        (
            tokenizer.decode(source),
            tokenizer.decode(target),
            source_language,
            target_language,
            tokenizer.tokens(source[:1])[0],
        )
        for source, target, source_language, target_language in zip(
            batch.source_ids.tolist(),
            batch.labels.tolist(),
            batch.source_languages,
            batch.target_languages,
            strict=True,
        )
    ]


def one_epoch(batches, epoch=0):
    before = sum(len(batches.plan(i).order) for i in range(epoch))
    return islice(batches.stream(before), len(batches.plan(epoch).order))


def all_pairs(corpus, targets):
    pairs = corpus.sentence_pairs("train", targets=targets)
    return Counter((p.source, p.target, p.source_language, p.target_language) for p in pairs)


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_holds_every_pair_once(corpus, tokenizer, epoch):
    batches = PairBatches(corpus, tokenizer, und_rate=0.0)
    rows = [row for batch in one_epoch(batches, epoch) for row in read_back(batch, tokenizer)]
    assert Counter(row[:4] for row in rows) == all_pairs(corpus, ["eng_Latn"])
    assert len(rows) == batches.num_pairs
    assert all(tag == source_language for _, _, source_language, _, tag in rows)


def test_many_to_many_uses_every_source_once_into_any_other_language(corpus, tokenizer):
    batches = PairBatches(corpus, tokenizer, targets=LANGUAGES)
    epochs = [
        [row[:4] for batch in one_epoch(batches, epoch) for row in read_back(batch, tokenizer)]
        for epoch in range(12)
    ]
    possible = all_pairs(corpus, LANGUAGES)
    for rows in epochs:
        assert set(rows) <= set(possible)
        assert Counter((source, language) for source, _, language, _ in rows) == Counter(
            (text, language)
            for i, language in enumerate(LANGUAGES)
            for row in corpus.train.rows
            if (text := row[i]) and sum(map(bool, row)) > 1
        )
    # After 12 epochs nearly all of the pairs came up: each is drawn with probability 1/3 or more per epoch.
    assert len({row for rows in epochs for row in rows}) > 0.97 * len(possible)


def test_a_language_that_is_named_twice_counts_once(corpus, tokenizer):
    once = PairBatches(corpus, tokenizer, targets=["eng_Latn"], sources=["fra_Latn"])
    twice = PairBatches(corpus, tokenizer, targets=["eng_Latn"] * 2, sources=["fra_Latn"] * 2)
    for a, b in zip(islice(once.stream(), 3), islice(twice.stream(), 3), strict=True):
        assert same(a, b)


def test_only_the_named_sources_are_read(corpus, tokenizer):
    batches = PairBatches(corpus, tokenizer, sources=["eng_Latn"], targets=LANGUAGES)
    rows = [row for batch in one_epoch(batches) for row in read_back(batch, tokenizer)]
    english = [row[LANGUAGES.index("eng_Latn")] for row in corpus.train.rows if sum(map(bool, row)) > 1]
    assert Counter(row[0] for row in rows) == Counter(filter(None, english))
    assert {row[3] for row in rows} == set(LANGUAGES) - {"eng_Latn"}


@given(st.integers(20, 600), st.integers(0, 3))
def test_every_batch_is_well_formed(corpus, tokenizer, batch_tokens, seed):
    batches = PairBatches(corpus, tokenizer, batch_tokens=batch_tokens, seed=seed)
    for batch in islice(batches.stream(), 20):
        B, S = batch.source_ids.shape
        L = batch.labels.shape[1]
        assert len(batch) == B == len(batch.source_languages) == len(batch.target_languages)
        assert max(S, L) * B <= batch_tokens or B == 1
        assert batch.source_ids.dtype == batch.labels.dtype == torch.int64
        for ids, mask in ((batch.source_ids, batch.source_mask), (batch.labels, batch.decoder_mask)):
            assert torch.equal(mask, (ids != tokenizer.pad_id).long())
            assert torch.equal(mask, mask.cummin(dim=1).values)  # padding only on the right
            assert mask.sum(dim=1).max() == ids.shape[1]
            ends = ids.gather(1, mask.sum(dim=1, keepdim=True) - 1)
            assert (ends == tokenizer.eos_id).all()
        targets = [tokenizer.language_id(code) for code in batch.target_languages]
        assert batch.labels[:, 0].tolist() == targets
        # The decoder reads </s>, then what it should have written.
        assert (batch.decoder_input_ids[:, 0] == tokenizer.eos_id).all()
        shifted = torch.where(batch.decoder_mask[:, 1:] == 1, batch.labels[:, :-1], tokenizer.pad_id)
        assert torch.equal(batch.decoder_input_ids[:, 1:], shifted)
        assert batch.num_tokens == batch.source_mask.sum() + batch.decoder_mask.sum()


def same(a, b):
    return torch.equal(a.source_ids, b.source_ids) and torch.equal(a.labels, b.labels)


def test_the_stream_depends_only_on_the_seed(corpus, tokenizer):
    first, again, other = (
        list(islice(PairBatches(corpus, tokenizer, seed=seed).stream(), 30)) for seed in (7, 7, 8)
    )
    assert all(map(same, first, again))
    assert not any(map(same, first, other))


def test_epochs_differ(corpus, tokenizer):
    batches = PairBatches(corpus, tokenizer, seed=7)
    assert not all(map(same, one_epoch(batches, 0), one_epoch(batches, 1)))


@given(st.integers(0, 200))
def test_a_stream_starts_at_any_step(corpus, tokenizer, start):
    batches = PairBatches(corpus, tokenizer, targets=LANGUAGES)
    assert len(batches.plan(0).order) < 150  # so that later epochs are reached
    whole = islice(batches.stream(), start, start + 3)
    assert all(map(same, whole, islice(batches.stream(start), 3)))


def test_a_share_of_the_sources_is_undetermined(corpus, tokenizer):
    for rate, low, high in ((0.0, 0, 0), (0.2, 0.15, 0.25), (1.0, 1, 1)):
        batches = PairBatches(corpus, tokenizer, targets=LANGUAGES, und_rate=rate)
        rows = [row for batch in one_epoch(batches) for row in read_back(batch, tokenizer)]
        share = sum(tag == "und" for *_, tag in rows) / len(rows)
        assert low <= share <= high
        assert all(tag in ("und", source_language) for _, _, source_language, _, tag in rows)


def test_sorting_by_length_leaves_little_padding(corpus, tokenizer):
    batches = list(one_epoch(PairBatches(corpus, tokenizer, batch_tokens=500)))
    padded = sum(batch.source_ids.numel() + batch.labels.numel() for batch in batches)
    assert sum(batch.num_tokens for batch in batches) > 0.8 * padded


def test_long_sentences_are_left_out(corpus, tokenizer):
    batches = PairBatches(corpus, tokenizer, max_tokens=12)
    kept = list(one_epoch(batches))
    assert 0 < batches.num_pairs < PairBatches(corpus, tokenizer).num_pairs
    assert max(max(batch.source_ids.shape[1], batch.labels.shape[1]) for batch in kept) <= 12
    with pytest.raises(ValueError, match=r"no sentence of the training split .* within 2 tokens"):
        PairBatches(corpus, tokenizer, max_tokens=2)


def test_unknown_languages_are_refused(corpus, tokenizer):
    with pytest.raises(UnknownLanguageError, match=r"deu_Latn .* is not a language of this corpus"):
        PairBatches(corpus, tokenizer, targets=["deu_Latn"])
    with pytest.raises(UnknownLanguageError, match=r"deu_Latn .* is not a language of this corpus"):
        PairBatches(corpus, tokenizer, sources=["deu_Latn"])
    lacking = Tokenizer.train(["a"], LANGUAGES[:2], 300)
    with pytest.raises(UnknownLanguageError, match=r"jpn_Jpan .* is not a language of this tokenizer"):
        PairBatches(corpus, lacking)


@pytest.mark.parametrize("undetermined", [False, True])
def test_evaluation_keeps_the_order(corpus, tokenizer, undetermined):
    pairs = corpus.sentence_pairs("test", targets=["eng_Latn", "fra_Latn"])
    batches = list(eval_batches(pairs, tokenizer, batch_tokens=300, undetermined=undetermined))
    rows = [row for batch in batches for row in read_back(batch, tokenizer)]
    assert rows == [
        (
            p.source,
            p.target,
            p.source_language,
            p.target_language,
            "und" if undetermined else p.source_language,
        )
        for p in pairs
    ]
    assert len(batches) > 10
    assert list(eval_batches([], tokenizer)) == []


def test_moving_and_describing(corpus, tokenizer):
    batch = next(PairBatches(corpus, tokenizer, batch_tokens=40).stream())
    moved = batch.to("meta")
    assert {moved.source_ids.device.type, moved.decoder_mask.device.type, moved.labels.device.type} == {
        "meta"
    }
    assert moved.source_languages == batch.source_languages
    assert f"{len(batch)} pairs" in batch.describe()
    assert f"{batch.source_languages[0]} to eng_Latn" in batch.describe()


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 120))
def test_cuts_are_greedy_and_within_the_budget(widths, batch_tokens):
    edges = cut_batches(widths, batch_tokens)
    assert edges[0] == 0
    assert edges[-1] == len(widths)
    batches = [widths[a:b] for a, b in pairwise(edges)]
    assert list(chain.from_iterable(batches)) == widths
    for i, batch in enumerate(batches):
        assert len(batch) == 1 or max(batch) * len(batch) <= batch_tokens
        if i + 1 < len(batches):  # the next sentence would not have fit
            more = [*batch, batches[i + 1][0]]
            assert max(more) * len(more) > batch_tokens
