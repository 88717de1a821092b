"""The specialisation experiments: what is counted, the commands, and the results that ship."""

import json
import math
from functools import cache

import pytest
import torch
from click.testing import CliRunner

from moe_edu.analysis.specialisation import mutual_information
from moe_edu.data import load_corpus
from moe_edu.experiments.specialisation import (
    MASK_SHARE,
    load_results,
    main,
    sample_pairs,
    sample_sentences,
)
from moe_edu.experiments.specialisation_ablation import run_letters
from moe_edu.experiments.specialisation_letters import load_letter_model
from moe_edu.experiments.specialisation_measure import (
    RoutedTokens,
    measure_specialisation,
    words_behind_cells,
)
from moe_edu.experiments.specialisation_translators import (
    many_to_many_fields,
    route_pairs,
    train_translator,
    untrained_translator,
)
from moe_edu.model.pretrained import SHIPPED, load_pretrained
from moe_edu.training.settings import TrainingSettings

LANGUAGES = ("eng_Latn", "fra_Latn", "rus_Cyrl")


def routed(language, expert, word, languages=LANGUAGES):
    """Tokens of one sentence each."""
    N = len(language)
    return RoutedTokens(
        num_experts=2,
        expert_index=torch.tensor([[e, 1 - e] for e in expert]),
        sentence=torch.arange(N),
        language=torch.tensor(language),
        token=torch.arange(N) % 3,
        position=torch.arange(N) % 2,
        word=torch.tensor(word),
        languages=languages,
        words=("mai", "juin", "May"),
    )


class TestMeasures:
    def test_experts_that_follow_the_script_reveal_only_the_script(self):
        # English and French share expert 0, Russian has expert 1.
        tokens = routed([0, 1, 2, 2] * 50, [0, 0, 1, 1] * 50, [0] * 200)
        measured = measure_specialisation(tokens, permutations=5)
        assert measured["script"].bits == pytest.approx(1)
        assert measured["language"].bits == pytest.approx(1)
        assert measured["language"].entropy == pytest.approx(1.5)
        assert measured["family"].bits == 0  # all three are Indo-European
        assert measured["position"].entropy == pytest.approx(1)

    def test_words_of_a_cell_are_its_most_frequent(self):
        tokens = routed([1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0], [0, 1, 1, 0, -1, 2])
        cells = words_behind_cells(tokens, most=1)
        assert cells == [[["May"], []], [["juin"], ["mai"]], [[], []]]

    def test_selecting_and_joining_keep_tokens_together(self):
        tokens = routed([0, 1, 2], [0, 1, 0], [0, 1, 2])
        part = tokens.select(tokens.language != 1)
        assert part.first_choice.tolist() == [0, 0]
        assert part.sentence.tolist() == [0, 2]
        assert len(RoutedTokens.join([part, tokens])) == 5
        assert tokens.load().tolist() == [[1, 0], [0, 1], [1, 0]]


class TestTranslators:
    def test_the_shipped_encoder_is_routed_as_by_route(self):
        translator = load_pretrained(device="cpu")
        pairs = load_corpus(("fra_Latn", "eng_Latn")).sentence_pairs("test", ["fra_Latn"])[:5]
        routing = route_pairs(translator, pairs)
        assert routing.decoder is None
        assert routing.encoder is not None
        for i, pair in enumerate(pairs):
            alone = translator.route(pair.source, source="fra_Latn")
            expected = alone.layers[1].expert_index[1:-1]  # without tag and </s>
            tokens = routing.encoder.select(routing.encoder.sentence == i)
            assert torch.equal(tokens.expert_index, expected)
            names = [tokens.words[token] for token in tokens.token.tolist()]
            assert tuple(names) == alone.tokens[1:-1]
            assert {tokens.languages[code] for code in tokens.language.tolist()} == {"fra_Latn"}

    def test_a_sparse_decoder_is_routed_by_what_it_writes(self):
        corpus = load_corpus(("fra_Latn", "eng_Latn"))
        settings = TrainingSettings(steps=1, vocab_size=400, batch_tokens=100, targets=None)
        small = {
            "d_model": 16,
            "encoder_ffn_dim": 8,
            "decoder_ffn_dim": 8,
            "encoder_sparse_step": 0,
            "num_experts": 3,
        }
        translator = train_translator(corpus, settings, many_to_many_fields(**small), 0).translator
        pairs = corpus.sentence_pairs("test", ["fra_Latn"], ["eng_Latn"])[:4]
        pairs += corpus.sentence_pairs("test", ["eng_Latn"], ["fra_Latn"])[:4]
        routing = route_pairs(translator, pairs)
        assert routing.encoder is None
        tokens = routing.decoder
        for i, pair in enumerate(pairs):
            ids = tokens.token[tokens.sentence == i].tolist()
            assert ids == translator.tokenizer.encode_pieces([pair.target])[0]
            assert {tokens.languages[code] for code in tokens.language[tokens.sentence == i].tolist()} == {
                pair.target_language
            }
            source = routing.decoder_source_language[tokens.sentence == i]
            assert {tokens.languages[code] for code in source.tolist()} == {pair.source_language}

    def test_the_untrained_translator_has_the_first_weights_of_training(self):
        corpus = load_corpus(("fra_Latn", "eng_Latn"))
        settings = TrainingSettings(
            steps=1, seed=4, vocab_size=400, batch_tokens=100, learning_rate=1e-30, weight_decay=0
        )
        translator = train_translator(corpus, settings, {"d_model": 16}, 0).translator
        twin = untrained_translator(translator, seed=4)
        for one, other in zip(translator.model.parameters(), twin.model.parameters(), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-20)


class TestSamples:
    def test_the_same_number_of_each_language_and_the_same_every_time(self):
        table = load_corpus(LANGUAGES).test
        sentences = sample_sentences(table, 5)
        assert [s.language for s in sentences] == [code for code in LANGUAGES for _ in range(5)]
        assert sentences == sample_sentences(table, 5)

    def test_pairs_of_each_direction(self):
        pairs = sample_pairs(load_corpus(LANGUAGES), LANGUAGES, LANGUAGES, 2)
        assert len(pairs) == 12
        assert all(pair.source_language != pair.target_language for pair in pairs)


class TestCommands:
    def test_letters(self, tmp_path):
        languages = ",".join(LANGUAGES)
        result = CliRunner().invoke(
            main,
            f"letters --seeds 3,4 --steps 2 --each 2 --permutations 1 --experts 4 --languages {languages} "
            f"--out {tmp_path}".split(),
        )
        assert result.exit_code == 0, result.output
        written = load_results("letters", tmp_path)
        assert [run["seed"] for run in written["runs"]] == [3, 4]
        assert [row["experts"] for row in written["runs"][0]["pruning"]] == [4, 2, 1]
        assert written["languages"] == list(LANGUAGES)
        assert (
            load_letter_model(tmp_path / "specialisation_letters.safetensors").alphabet.languages == LANGUAGES
        )

    def test_decoder(self, tmp_path):
        command = (
            f"decoder --seeds 0 --steps 1 --each 1 --permutations 1 --languages {','.join(LANGUAGES)} --out"
        )
        result = CliRunner().invoke(main, [*command.split(), str(tmp_path)])
        assert result.exit_code == 0, result.output
        (run,) = load_results("decoder", tmp_path)["runs"]
        assert "source language" in run["trained"]["decoder"]["information"]
        assert "words" in run["untrained"]["encoder"]

    def test_translator(self, tmp_path):
        command = ["translator", "--each", "1", "--permutations", "1", "--out", str(tmp_path)]
        result = CliRunner().invoke(main, [*command, "--model", str(SHIPPED)])
        assert result.exit_code == 0, result.output
        first, second = load_results("translator", tmp_path)["runs"]
        assert first["trained"]["encoder"]["load"] == second["trained"]["encoder"]["load"]
        assert "words" not in second["trained"]["encoder"]

    def test_seeds_that_are_not_numbers_are_refused(self):
        result = CliRunner().invoke(main, ["letters", "--seeds", "one"])
        assert result.exit_code == 2
        assert "whole numbers" in result.output


@cache
def shipped(model):
    return load_results(model)


def layers(model):
    """(run, state, side, report) of every measured layer that ships."""
    for run in shipped(model)["runs"]:
        for state in ("trained", "untrained"):
            reports = {"encoder": run[state]} if model == "letters" else run[state]
            for side, report in reports.items():
                yield run, state, side, report


def above_chance(report, label="language"):
    return report["information"][label]["bits"] - report["information"][label]["chance"]


@pytest.mark.parametrize("model", ["letters", "translator", "decoder"])
class TestShippedResults:
    def test_three_seeds_or_more(self, model):
        assert len({(run.get("model"), run["seed"]) for run in shipped(model)["runs"]}) >= 3

    def test_the_information_is_that_of_its_table(self, model):
        for _, _, _, report in layers(model):
            load = torch.tensor(report["load"])
            assert load.shape == (len(shipped(model)["languages"]), shipped(model)["config"]["num_experts"])
            assert load.sum() == report["tokens"] == torch.tensor(report["coactivation"]).sum()
            assert report["information"]["language"]["bits"] == pytest.approx(
                mutual_information(load), abs=1e-4
            )

    def test_every_number_is_finite_and_no_information_exceeds_its_entropy(self, model):
        for _, _, _, report in layers(model):
            for values in report["information"].values():
                assert all(math.isfinite(value) for value in values.values())
                assert 0 <= values["bits"] <= values["entropy"] + 1e-4

    def test_every_cell_of_the_first_run_has_words(self, model):
        first = shipped(model)["runs"][0]
        for run, _, _, report in layers(model):
            assert ("words" in report) == (run is first)
            if run is first:
                for counts, words in zip(report["load"], report["words"], strict=True):
                    assert all(count > 0 for count, found in zip(counts, words, strict=True) if found)

    def test_the_file_is_small(self, model):
        assert len(json.dumps(shipped(model), ensure_ascii=False).encode()) < 600_000


class TestClaims:
    """What lesson 08 says about these results."""

    def test_letters_experts_follow_the_language(self):
        for run in shipped("letters")["runs"]:
            trained, untrained = run["trained"], run["untrained"]
            assert above_chance(trained) > 10 * above_chance(untrained)
            hidden = [
                report["information_masked_letters_only"]["language"] for report in (trained, untrained)
            ]
            assert hidden[0]["bits"] - hidden[0]["chance"] > 1.5
            assert hidden[1]["bits"] - hidden[1]["chance"] < 0.1

    def test_the_translators_encoder_reveals_next_to_nothing(self):
        for run in shipped("translator")["runs"]:
            assert run["chrf"] > 80
            assert above_chance(run["trained"]["encoder"]) < 0.05

    def test_the_heaviest_user_of_an_expert_loses_most_without_it(self):
        for run in shipped("letters")["runs"]:
            report = run["ablation"]["reroute"]
            assert report["correlation_of_drop_and_use"] > 0.3
            assert report["mean_drop_of_the_heaviest_user"] > 2 * report["mean_drop_of_the_others"]

    def test_pruning_must_consider_each_language(self):
        for run in shipped("letters")["runs"]:
            whole = run["trained"]["accuracy"]
            for row in run["pruning"]:
                random = sum(row["random"]) / len(row["random"])
                if row["experts"] == 8:
                    assert row["most_active_of_each_language"] > 0.98 * whole
                if row["experts"] in (4, 8):
                    assert row["most_active"] < random < row["most_active_of_each_language"]

    def test_the_shipped_model_is_the_one_of_the_first_run(self):
        results = shipped("letters")
        sentences = sample_sentences(load_corpus().test, results["sentences_of_each"])
        accuracy = run_letters(load_letter_model(), sentences, MASK_SHARE).accuracy()
        assert accuracy == pytest.approx(results["runs"][0]["trained"]["accuracy"], abs=0.005)
