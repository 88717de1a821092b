"""What the notebooks are made of: parameters, claims, live pictures, the translation box, and how they are saved."""

import re
from collections import Counter

import ipywidgets
import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output

from moe_edu import MoEConfig, MoETranslator, TextTranslator, expert_capacity, explorers, lessons
from moe_edu.data import Tokenizer, load_corpus
from moe_edu.figures.plots import score_figure
from moe_edu.lessons.execute import WIDGET_VIEW, drop_widgets, execute
from moe_edu.lessons.notebook import UnknownParameterError, as_bundle, assigned_names
from moe_edu.lessons.translate_box import answer_html, seat_again
from moe_edu.training.loop import train
from moe_edu.training.settings import TrainingSettings, small_config


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(["eng_Latn", "fra_Latn", "jpn_Jpan"])


@pytest.fixture(scope="module")
def translator(corpus):
    """One that was never trained: its output is gibberish, which is enough here."""
    tokenizer = Tokenizer.train(corpus.train.texts(), corpus.languages, 600)
    torch.manual_seed(0)
    config = small_config(vocab_size=len(tokenizer), d_model=16, init_std=0.5, max_position_embeddings=60)
    return TextTranslator(MoETranslator(config).eval(), tokenizer)


@pytest.fixture
def shown(monkeypatch):
    """The bundles displayed below the cell."""
    bundles = []
    monkeypatch.setattr("moe_edu.lessons.notebook.display", lambda bundle, raw: bundles.append(bundle))
    monkeypatch.setattr("moe_edu.lessons.live.clear_output", lambda wait: bundles.clear())
    return bundles


class TestParameters:
    DECLARED = "# Parameters\nsteps = 2000  # how many\nseed = 7\nfast = False"

    def test_names_at_the_top_level(self):
        assert assigned_names("a = b = 1\nif a:\n    c = 2\nd.e = 3\n# f = 4") == ["a", "b"]

    def test_known_ones_pass(self):
        lessons.check_parameters(
            ["", "import x", self.DECLARED, "# Parameters\nseed = 8\nfast = True\n", "y = 1"]
        )

    def test_without_injection_or_declaration(self):
        lessons.check_parameters(["", self.DECLARED])
        lessons.check_parameters([""])

    def test_an_unknown_one_is_refused_with_near_matches(self):
        with pytest.raises(UnknownParameterError, match="unknown parameter 'step'; did you mean steps"):
            lessons.check_parameters([self.DECLARED, "# Parameters\nstep = 3"])

    def test_one_that_resembles_nothing_gets_the_list(self):
        with pytest.raises(UnknownParameterError, match="'qqq'; this notebook has steps, seed, fast"):
            lessons.check_parameters([self.DECLARED, "# Parameters\nqqq = 3"])


def test_claims_are_ticked_or_not(capsys):
    lessons.claim("water is wet", True)
    lessons.claim("fire is cold", False)
    assert capsys.readouterr().out == "✓ water is wet\n✗ not in this run: fire is cold\n"


class TestShow:
    def test_a_figure_carries_its_description(self):
        bundle = as_bundle(score_figure({"a": 50.0}))
        assert bundle["text/plain"] == "From a with 50.0 down to a with 50.0."
        assert bundle["application/vnd.plotly.v1+json"]["data"][0]["x"] == [50.0]

    @pytest.mark.parametrize("variable", ["COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"])
    def test_colab_and_kaggle_get_html(self, monkeypatch, variable):
        monkeypatch.setenv(variable, "x")
        assert set(as_bundle(score_figure({"a": 50.0}))) == {"text/html", "text/plain"}

    @pytest.mark.parametrize(
        "widget",
        [ipywidgets.HTML("<p>a</p>"), explorers.get("first_steps").widget()],
        ids=["ipywidgets", "anywidget"],
    )
    def test_a_widget_says_in_words_what_to_do_without_a_kernel(self, widget):
        bundle = as_bundle(widget)
        assert bundle[WIDGET_VIEW]["model_id"] == widget.model_id
        assert bundle["text/plain"] == "Run this cell to use its controls."

    def test_html_is_html(self):
        assert as_bundle("<p>a</p>")["text/html"] == "<p>a</p>"

    def test_begin_brings_the_style_sheet_and_one_thread(self, shown):
        torch.set_num_threads(2)
        lessons.begin()
        assert torch.get_num_threads() == 1
        assert "<style>" in shown[0]["text/html"]


class TestLiveTraining:
    def test_follows_a_run(self, corpus, shown):
        phrases = lessons.choose_phrases(corpus, ["fra_Latn", "jpn_Jpan"], ["unit", "date"], seed=1)
        settings = TrainingSettings(
            steps=6, batch_tokens=300, vocab_size=600, log_every=1, eval_every=3, eval_sentences=2
        )
        live = lessons.LiveTraining(phrases, settings.steps, redraw_every=2)
        assert "Step 0 of 6" in shown[0]["text/html"]
        train(
            corpus,
            settings,
            model_fields={"d_model": 16},
            on_record=live.on_record,
            show_progress=False,
            test_sentences=0,
        )
        assert [record["step"] for record in live.history] == [1, 2, 3, 4, 5, 6]
        assert [snapshot.step for snapshot in live.snapshots] == [1, 3, 6]
        assert all(len(snapshot.translations) == 2 for snapshot in live.snapshots)
        status, curves, table = shown
        assert "Step 6 of 6" in status["text/html"]
        assert list(curves["application/vnd.plotly.v1+json"]["data"][0]["x"]) == [1, 2, 3, 4, 5, 6]
        assert phrases[0].target in table["text/html"]

    def test_first_right(self, corpus, translator, shown):
        phrase = lessons.choose_phrases(corpus, ["fra_Latn"], ["unit"])[0]
        says = translator.translate(phrase.source, target="eng_Latn", source="fra_Latn")
        live = lessons.LiveTraining([phrase._replace(target=says), phrase._replace(target="never")], 10)
        record = {"step": 5, "loss": 1.0, "seconds": 1, "tokens_per_second": 9, "expert_load": {}}
        live.on_record(record, translator)
        assert live.first_right() == [5, None]

    def test_phrases_are_held_out_from_the_languages_in_turn(self, corpus):
        phrases = lessons.choose_phrases(corpus, ["fra_Latn", "jpn_Jpan"], ["unit", "date", "money"])
        assert [phrase.kind for phrase in phrases] == ["unit", "date", "money"]
        assert [phrase.source_language for phrase in phrases] == ["fra_Latn", "jpn_Jpan", "fra_Latn"]
        seen = set(corpus.train.texts())
        assert not any(phrase.source in seen for phrase in phrases)

    def test_a_kind_that_is_not_there(self, corpus):
        with pytest.raises(ValueError, match="no 'poem' in fra_Latn"):
            lessons.choose_phrases(corpus, ["fra_Latn"], ["poem"])


class TestTranslateBox:
    def controls(self, box):
        return {control.description: control for control in box.children[:-1]}

    def test_typing_and_choosing_change_the_answer(self, translator):
        box = lessons.translate_box(translator, text="1 août")
        answer = box.children[-1]
        before = answer.value
        self.controls(box)["Phrase"].value = "dans 3 jours"
        typed = answer.value
        self.controls(box)["From"].value = "fra_Latn"
        chosen = answer.value
        self.controls(box)["Capacity factor"].value = 0.25
        assert len({before, typed, chosen, answer.value}) == 4
        assert "fra_Latn" in chosen
        assert "✕" in answer.value

    def test_offers_the_models_languages(self, translator):
        controls = self.controls(lessons.translate_box(translator, targets=["eng_Latn", "fra_Latn"]))
        assert [code for _, code in controls["From"].options] == ["und", *translator.tokenizer.languages]
        assert [code for _, code in controls["To"].options] == ["eng_Latn", "fra_Latn"]

    @pytest.mark.parametrize(
        "text", ["<b>1</b>", "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;"]
    )
    def test_typed_text_is_text(self, translator, text):
        html = answer_html(translator, text, source="und", target="eng_Latn")
        assert not re.search(r"<(script|img|i\b|u\b)", html)
        assert "<b>1</b>" not in html

    @pytest.mark.parametrize("text", ["", "  "])
    def test_an_empty_box_asks_for_a_phrase(self, translator, text):
        assert "Type a phrase" in answer_html(translator, text, source="und", target="eng_Latn")

    def test_a_long_text_is_answered_with_the_reason(self, translator):
        html = answer_html(translator, "<1> " * 100, source="und", target="eng_Latn")
        assert "longer than the model&#x27;s 60 positions" in html
        assert "moe-error" in html

    @pytest.mark.parametrize("factor", [0.25, 1.0, 2.0])
    def test_seats_as_training_would(self, translator, factor):
        """The hatched choices are those that the model drops in training mode with this capacity factor."""
        text = "vendredi 2 août 1996"
        config = small_config(**{**vars(translator.model.config), "expert_capacity_factor": factor})
        model = MoETranslator(config)
        model.load_state_dict(translator.model.state_dict())
        ids = torch.tensor([translator.tokenizer.encode_source(text, "und")])
        trained = model.train().encoder(ids).routing[1]
        seated = seat_again(translator.route(text).layers[1], factor, translator.model.config)
        assert seated.capacity == expert_capacity(ids.shape[1], config, training=True)
        assert torch.equal(seated.kept, trained.kept)
        assert torch.allclose(seated.combine_weights, trained.combine_weights, atol=1e-6)

    def test_without_a_limit_nothing_changes(self, translator):
        layer = translator.route("1 août").layers[1]
        assert seat_again(layer, float("inf"), translator.model.config) is layer


class TestExecute:
    def test_runs_and_drops_what_needs_a_kernel(self, tmp_path):
        source = "import ipywidgets\nipywidgets.IntSlider(description='a')"
        notebook = new_notebook(cells=[new_code_cell(source), new_code_cell("1 + 1")])
        cost = execute(notebook, tmp_path)
        assert cost.seconds > 0
        assert cost.peak_mb is None or cost.peak_mb > 10
        assert [cell.execution_count for cell in notebook.cells] == [1, 2]
        slider, two = (cell.outputs[0].data for cell in notebook.cells)
        assert WIDGET_VIEW not in slider
        assert slider["text/plain"].startswith("IntSlider")
        assert two["text/plain"] == "2"
        assert "widgets" not in notebook.metadata
        nbformat.validate(notebook)

    def test_keeps_other_outputs(self):
        cell = new_code_cell("", outputs=[new_output("stream", text="a")])
        assert drop_widgets(new_notebook(cells=[cell])).cells[0].outputs[0].text == "a"


class TestNumbersInProse:
    """What the lesson says in words and its own claims do not check."""

    def test_nllb_moe_keeps_most_parameters_in_experts(self):
        # The published model: NLLB Team 2022, section 8.1.2 and table 36; config.json of facebook/nllb-moe-54b.
        fields = {"d_model": 2048, "encoder_layers": 24, "decoder_layers": 24}
        widths = {"encoder_ffn_dim": 8192, "decoder_ffn_dim": 8192}
        with torch.device("meta"):
            model = MoETranslator(MoEConfig(vocab_size=256206, **fields, **widths))
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        assert sum(sizes.values()) == pytest.approx(54.5e9, rel=0.01)
        assert experts > 0.9 * sum(sizes.values())

    def test_every_fifth_source_tag_is_und(self):
        assert TrainingSettings().und_rate == 0.2

    def test_the_model(self):
        config = small_config()
        assert (config.encoder_layers, config.decoder_layers, config.encoder_sparse_step) == (2, 1, 2)
        assert config.decoder_sparse_step == 0

    def test_the_six_words_are_not_in_the_corpus(self):
        corpus = load_corpus()
        for split in ("train", "valid", "test"):
            for word in ("cat", "sleeps", "chat", "dort"):
                assert not any(word in text.split() for text in corpus.split(split).texts())

    def test_a_countrys_name_is_rarer_than_days(self):
        table = load_corpus().train
        english = table.column("eng_Latn")
        lists = [text for text, kind in zip(english, table.kinds, strict=True) if kind == "countries"]
        names = Counter(name for text in lists for name in re.split(r", and |, | and ", text))
        days = sum("days" in text.split() for text in english if text)
        assert max(names.values()) < days
