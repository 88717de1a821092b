"""The letter model: its alphabet, masking, training, files, and the effect of leaving experts out."""

import pytest
import torch

from moe_edu.analysis.specialisation import without_experts
from moe_edu.data import UnknownLanguageError, load_corpus
from moe_edu.experiments.specialisation_ablation import (
    WordIndex,
    ablate_each,
    ablation_report,
    prune,
    run_letters,
    sparse_layer,
)
from moe_edu.experiments.specialisation_letters import (
    MASK,
    Alphabet,
    LetterModel,
    Sentence,
    letter_config,
    load_letter_model,
    make_batch,
    make_test_batch,
    sentences_of,
    stream_batches,
    train_letter_model,
    untrained_twin,
)
from moe_edu.model.checkpoint import CheckpointError
from moe_edu.model.encoder import MoEEncoder
from moe_edu.training.settings import TrainingSettings

LANGUAGES = ("eng_Latn", "fra_Latn", "hin_Deva")


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(LANGUAGES)


@pytest.fixture(scope="module")
def alphabet(corpus):
    return Alphabet.learn(corpus.train)


@pytest.fixture
def model(alphabet):
    return LetterModel(MoEEncoder(letter_config(alphabet, num_experts=4, init_std=0.3)).eval(), alphabet)


@pytest.fixture(scope="module")
def sentences(corpus):
    return sentences_of(corpus.test)[:30]


class TestAlphabet:
    def test_writes_what_it_reads(self, alphabet, sentences):
        for text, language in sentences:
            tag, *letters, end = alphabet.encode(text, language)
            assert alphabet.names[tag] == language
            assert alphabet.names[end] == "</s>"
            assert "".join(alphabet.names[i] for i in letters) == text

    def test_a_gap_is_masked_and_a_strange_letter_unknown(self, alphabet):
        assert alphabet.encode("a_ꙮ", "eng_Latn")[2:4] == [alphabet.mask_id, alphabet.unk_id]

    def test_only_letters_and_vowel_signs_can_be_masked(self, alphabet):
        maskable = {
            name for name, flag in zip(alphabet.names, alphabet.maskable.tolist(), strict=True) if flag
        }
        assert {"e", "é", "क", "ा"} <= maskable
        assert maskable.isdisjoint({" ", "1", ",", MASK, "</s>", *LANGUAGES})

    def test_every_id_has_one_name(self, alphabet):
        assert len(alphabet) == len(alphabet.names) == len(set(alphabet.names)) == len(alphabet.maskable)

    def test_an_unknown_language_is_an_error(self, alphabet):
        with pytest.raises(UnknownLanguageError, match="deu_Latn"):
            alphabet.encode("Uhr", "deu_Latn")


class TestBatches:
    def test_masks_only_letters_and_about_as_many_as_asked(self, alphabet, corpus):
        rows = [alphabet.encode(*s) for s in sentences_of(corpus.train)[:2000]]
        batch = make_batch(rows, alphabet, 0.4, torch.Generator().manual_seed(0))
        letters = alphabet.maskable[batch.ids]
        assert not (batch.masked & ~letters).any()
        assert (batch.masked.sum() / letters.sum()).item() == pytest.approx(0.4, abs=0.02)
        inputs = batch.inputs(alphabet)
        assert (inputs[batch.masked] == alphabet.mask_id).all()
        assert torch.equal(inputs[~batch.masked], batch.ids[~batch.masked])

    def test_a_test_sentence_is_masked_alike_in_any_batch(self, alphabet, sentences):
        together = make_test_batch(sentences, alphabet, 0.4)
        alone = make_test_batch(sentences[7:8], alphabet, 0.4)
        width = alone.ids.shape[1]
        assert torch.equal(together.masked[7, :width], alone.masked[0])
        assert not torch.equal(make_test_batch(sentences, alphabet, 0.4, seed=1).masked, together.masked)

    def test_an_epoch_holds_every_sentence_once(self, alphabet, corpus):
        rows = [alphabet.encode(*s) for s in sentences_of(corpus.valid)]
        seen = []
        for batch in stream_batches(rows, alphabet, 0.4, 300, seed=0):
            assert batch.ids.numel() <= 300
            seen += [
                tuple(row[mask.bool()].tolist())
                for row, mask in zip(batch.ids, batch.attention_mask, strict=True)
            ]
            if len(seen) == len(rows):
                break
        assert sorted(seen) == sorted(map(tuple, rows))


class TestModel:
    def test_training_teaches_it_to_restore(self, corpus, alphabet, sentences):
        settings = TrainingSettings(steps=60, batch_tokens=300, learning_rate=3e-3, warmup_steps=10)
        trained = train_letter_model(
            corpus.train, alphabet, settings, config=letter_config(alphabet, num_experts=4)
        )
        before = run_letters(untrained_twin(trained), sentences).accuracy()
        assert run_letters(trained, sentences).accuracy() > before + 0.05

    def test_training_repeats_with_the_same_seed(self, corpus, alphabet):
        settings = TrainingSettings(steps=2, batch_tokens=200, seed=3)
        first, second = (train_letter_model(corpus.train, alphabet, settings).encoder for _ in range(2))
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_the_untrained_twin_has_the_weights_that_training_begins_with(self, corpus, alphabet):
        settings = TrainingSettings(steps=1, batch_tokens=200, seed=5, learning_rate=1e-30)
        trained = train_letter_model(corpus.train, alphabet, settings)
        twin = untrained_twin(trained, seed=5)
        for one, other in zip(trained.encoder.parameters(), twin.encoder.parameters(), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-20)

    def test_restores_gaps_and_leaves_the_rest(self, model):
        written = "d_cemb_r 19, 2024"
        restored = model.restore(written, "eng_Latn")
        assert len(restored) == len(written)
        assert MASK not in restored
        assert all(old in (MASK, new) for old, new in zip(written, restored, strict=True))

    def test_a_saved_model_is_read_back(self, model, sentences, tmp_path):
        model.save(tmp_path / "m.safetensors", torch.float32)
        again = load_letter_model(tmp_path / "m.safetensors")
        assert again.alphabet == model.alphabet
        assert again.encoder.config == model.encoder.config
        assert torch.equal(run_letters(again, sentences).restored, run_letters(model, sentences).restored)

    @pytest.mark.parametrize("content", [None, b"", b"no model"])
    def test_a_damaged_file_is_a_clear_error(self, content, tmp_path):
        path = tmp_path / "m.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a readable letter model"):
            load_letter_model(path)


class TestPass:
    def test_every_character_is_a_token_and_every_masked_letter_counts(self, model, sentences):
        seen = run_letters(model, sentences)
        assert len(seen.tokens) == sum(len(s.text) for s in sentences)
        assert (seen.tokens.token[seen.masked] == model.alphabet.mask_id).all()
        assert not (seen.restored & ~seen.masked).any()
        assert (seen.tokens.expert_index >= 0).all()

    def test_accuracy_by_language_adds_up(self, model, sentences):
        seen = run_letters(model, sentences)
        counts = torch.bincount(seen.tokens.language[seen.masked], minlength=3)
        assert float((seen.accuracy_by_language() * counts).sum() / counts.sum()) == pytest.approx(
            seen.accuracy()
        )

    def test_words_are_runs_of_letters(self, alphabet):
        index = WordIndex(alphabet)
        numbers = index.of_sentences(["le 2 mai", "mai"], 10)
        words = index.words()
        assert [words[i] if i >= 0 else None for i in numbers[0].tolist()] == [
            None, "le", "le", None, "2", None, "mai", "mai", "mai", None
        ]  # fmt: skip
        assert numbers[1, 1] == numbers[0, 6]

    def test_a_dense_model_is_one_expert(self, alphabet, sentences):
        dense = LetterModel(MoEEncoder(letter_config(alphabet, encoder_sparse_step=0)).eval(), alphabet)
        tokens = run_letters(dense, sentences).tokens
        assert tokens.load().sum() == len(tokens)
        with pytest.raises(ValueError, match="no sparse layer"):
            sparse_layer(dense)


class TestExpertsLeftOut:
    def test_each_row_is_a_pass_without_that_expert(self, model, sentences):
        rows = ablate_each(model, sentences, "silence")
        assert rows.shape == (4, 3)
        with without_experts(sparse_layer(model), [2], "silence"):
            assert torch.equal(run_letters(model, sentences).accuracy_by_language(), rows[2])

    def test_the_report_compares_drops_with_use(self, model, sentences):
        report = ablation_report(model, sentences, "reroute")
        whole = run_letters(model, sentences).accuracy_by_language()
        expected = whole[None] - ablate_each(model, sentences, "reroute")
        assert torch.tensor(report["drop"]).double() == pytest.approx(expected, abs=1e-4)
        assert -1 <= report["correlation_of_drop_and_use"] <= 1

    def test_keeping_all_experts_changes_nothing_and_pruning_starts_from_the_busiest(self, model, sentences):
        rows = prune(model, sentences, sentences, keep=[4, 1], random_draws=2)
        accuracy = run_letters(model, sentences).accuracy()
        assert rows[0]["most_active"] == pytest.approx(accuracy, abs=1e-4)
        assert rows[0]["most_active_of_each_language"] == pytest.approx(accuracy, abs=1e-4)
        assert rows[0]["random"] == pytest.approx([accuracy] * 2, abs=1e-4)
        busiest = int(
            torch.bincount(run_letters(model, sentences).tokens.expert_index.flatten(), minlength=4).argmax()
        )
        with without_experts(sparse_layer(model), [e for e in range(4) if e != busiest]):
            assert rows[1]["most_active"] == pytest.approx(run_letters(model, sentences).accuracy(), abs=1e-4)


def test_sentences_keep_their_language(corpus):
    assert sentences_of(corpus.test)[0] == Sentence(corpus.test.rows[0][0], "eng_Latn")
    assert len(sentences_of(corpus.test)) == sum(text is not None for row in corpus.test.rows for text in row)
