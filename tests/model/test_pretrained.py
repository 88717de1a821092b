"""Text in, text out: the model that ships, its errors, and the routing of a phrase."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from moe_edu import TextTranslator, cli, load_pretrained
from moe_edu.data import UnknownLanguageError
from moe_edu.model import pretrained
from moe_edu.model.checkpoint import CheckpointError
from moe_edu.model.pretrained import SHIPPED, pad_ids


@pytest.fixture(scope="module")
def translator():
    return load_pretrained(device="cpu")


def test_ships_in_at_most_6_mb():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 6_000_000


def test_translates_the_readmes_phrase(translator):
    assert translator.translate("quinta-feira, 1 de agosto de 1996") == "Thursday, August 1, 1996"


def test_a_named_language_and_beams(translator):
    phrase = "quinta-feira, 1 de agosto de 1996"
    assert translator.translate(phrase, source="por_Latn", num_beams=4) == "Thursday, August 1, 1996"


def test_a_batch_gives_the_same_as_single_phrases(translator):
    texts = ["1 août 1996", "vor 3 Tagen", "hace 5 años"]
    sources = ["fra_Latn", "deu_Latn", "und"]
    together = translator.translate_batch(texts, target="eng_Latn", source=sources)
    alone = [translator.translate(text, source=code) for text, code in zip(texts, sources, strict=True)]
    assert together == alone


def test_the_device_is_auto(monkeypatch):
    monkeypatch.setattr(pretrained, "resolve_device", {"auto": torch.device("meta")}.__getitem__)
    assert load_pretrained().device == torch.device("meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 0)])
def test_a_missing_gpu_is_reported(device):
    with pytest.raises(ValueError, match="this PyTorch finds no NVIDIA GPU: choose device cpu"):
        load_pretrained(device=device)


@pytest.mark.gpu
def test_translates_on_the_gpu():
    translator = load_pretrained()
    assert translator.device.type == "cuda"
    assert translator.translate("quinta-feira, 1 de agosto de 1996") == "Thursday, August 1, 1996"


def test_one_source_language_may_apply_to_all_texts(translator):
    texts = ["1 août 1996", "dans 3 jours"]
    expected = translator.translate_batch(texts, source=["fra_Latn", "fra_Latn"])
    assert translator.translate_batch(texts, source="fra_Latn") == expected
    assert translator.translate_batch(texts) == translator.translate_batch(texts, source=["und", "und"])


@pytest.mark.parametrize("source", ["und", []])
def test_no_texts_give_no_translations(translator, source):
    assert translator.translate_batch([], source=source, num_beams=4) == []


def test_a_malformed_batch_is_refused(translator):
    with pytest.raises(ValueError, match="2 source languages for 1 texts: give one for all, or one for each"):
        translator.translate_batch(["a"], source=["fra_Latn", "und"])
    with pytest.raises(ValueError, match="texts is a single string"):
        translator.translate_batch("1 août 1996")


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_nothing_gives_nothing(translator, text):
    assert translator.translate(text) == ""


@pytest.mark.parametrize(
    "text", ["</s> <pad> fra_Latn", "<script>alert(1)</script>", "🙂 \x00 \ud7ff", "ﷺ" * 3]
)
def test_any_text_gives_a_string(translator, text):
    assert isinstance(translator.translate(text, max_new_tokens=8), str)


def test_an_unknown_language_suggests_similar_ones(translator):
    with pytest.raises(UnknownLanguageError, match=r"did you mean.*eng_Latn"):
        translator.translate("a", target="english")


def test_language_that_the_model_does_not_know(translator):
    with pytest.raises(UnknownLanguageError, match="not a language of this model"):
        translator.translate("a", source="lim_Latn")


def test_a_language_that_the_model_was_never_trained_to_write(translator):
    message = r"never trained to write fra_Latn \(French\); it writes eng_Latn \(English\)"
    with pytest.raises(UnknownLanguageError, match=message):
        translator.translate("in 3 days", target="fra_Latn")


def test_any_language_is_tried_if_the_targets_are_unknown(translator, tmp_path):
    replace(translator, targets=None).save_pretrained(tmp_path)
    again = TextTranslator.from_pretrained(tmp_path, "cpu")
    assert again.targets is None
    assert again.translate("in 3 days", target="fra_Latn")


def test_text_longer_than_the_positions(translator):
    limit = translator.model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"longer than the model's {limit} positions"):
        translator.translate("1 " * 2 * limit)


def test_routing_of_a_phrase(translator):
    phrase = translator.route("1 août 1996", source="fra_Latn")
    assert phrase.tokens[0] == "fra_Latn"
    assert phrase.tokens[-1] == "</s>"
    assert phrase.layers, "the shipped model is sparse"
    for layer in phrase.layers.values():
        assert layer.num_tokens == len(phrase.tokens)
        assert layer.kept.all(), "nothing is dropped in eval"


def test_save_and_load_give_the_same_model(translator, tmp_path):
    translator.save_pretrained(tmp_path)
    again = TextTranslator.from_pretrained(tmp_path, "cpu")
    assert again.targets == translator.targets == ("eng_Latn",)
    for name, tensor in translator.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_transformers_reads_the_checkpoint(translator):
    """The files are in the published format: `transformers` computes the same logits."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.NllbMoeForConditionalGeneration.from_pretrained(
        SHIPPED, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokenizer = translator.tokenizer
    encoded = [tokenizer.encode_source(text, "und") for text in ("1 août 1996", "vor 3 Tagen")]
    ids, mask = pad_ids(encoded, tokenizer.pad_id, torch.device("cpu"))
    decoder_ids = torch.tensor([[2, tokenizer.language_id("eng_Latn")]] * 2)
    with torch.no_grad():
        ours = translator.model(ids, mask, decoder_ids).logits
        reference = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
    assert (ours - reference).abs().max() <= 2e-5 * reference.abs().max()


def test_transformers_generates_to_the_end_as_the_folder_says(translator):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.NllbMoeForConditionalGeneration.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    tokenizer = translator.tokenizer
    text = "mardi 26 octobre 2021, 12:27"
    ids = torch.tensor([tokenizer.encode_source(text, "fra_Latn")])
    forced = {"forced_bos_token_id": tokenizer.language_id("eng_Latn")}
    ours = translator.model.generate(ids, **forced)
    assert ours.shape[1] > 20, "without a setting in the folder, transformers stops after 20 tokens"
    assert theirs.generate(ids, **forced).tolist() == ours.tolist()


class TestDamage:
    @pytest.fixture
    def copy(self, tmp_path):
        return shutil.copytree(SHIPPED, tmp_path / "copy")

    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match="moe-edu train"):
            load_pretrained(tmp_path)

    def test_truncated_weights(self, copy):
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_pretrained(copy)

    def test_another_tokenizer(self, copy):
        path = copy / "config.json"
        config = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 1}), encoding="utf-8")
        with pytest.raises(CheckpointError, match="not of one training run"):
            load_pretrained(copy)

    @pytest.mark.parametrize("field", ["num_experts", "encoder_layers", "encoder_ffn_dim"])
    def test_a_configuration_of_a_huge_model(self, copy, field):
        """It is refused before it takes any memory."""
        path = copy / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), field: 10**9}), encoding="utf-8")
        with pytest.raises(CheckpointError, match="of a larger model than its"):
            load_pretrained(copy)

    def test_no_tokenizer(self, copy):
        (copy / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match="tokenizer"):
            load_pretrained(copy)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "cannot be read"),
            ("[]", "must name"),
            ('{"targets": "eng_Latn"}', "must name"),
            ('{"targets": []}', "must name"),
            ('{"targets": ["lim_Latn"]}', "must name"),
        ],
    )
    def test_damaged_targets(self, copy, text, message):
        (copy / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"generation_config\.json {message}"):
            load_pretrained(copy)

    def test_a_pickle_is_never_loaded(self, copy):
        torch.save({"a": torch.zeros(1)}, copy / "model.safetensors")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_pretrained(copy)


class TestCommandLine:
    def moe_edu(self, *arguments, **options):
        done = CliRunner().invoke(cli.main, arguments, **options)
        return SimpleNamespace(returncode=done.exit_code, stdout=done.stdout, stderr=done.stderr)

    def test_translates(self):
        done = self.moe_edu("translate", "--to", "eng_Latn", "quinta-feira, 1 de agosto de 1996")
        assert done.stdout == "Thursday, August 1, 1996\n"

    def test_translates_each_line_of_the_input(self):
        done = self.moe_edu("translate", input="1 août 1996\n\n")
        assert len(done.stdout.splitlines()) == 2

    def test_errors_are_one_line_without_a_traceback(self):
        done = self.moe_edu("translate", "--to", "klingon", "a")
        assert done.returncode == 1
        assert done.stderr.startswith("Error: unknown language 'klingon'")
        assert "Traceback" not in done.stderr

    @pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
    def test_a_missing_gpu_is_reported(self):
        done = self.moe_edu("translate", "--device", "cuda", "a")
        assert done.returncode == 1
        assert done.stderr.startswith("Error: this PyTorch finds no NVIDIA GPU")

    def test_a_target_outside_the_models_languages(self):
        done = self.moe_edu("translate", "--to", "fra_Latn", "in 3 days")
        assert done.returncode == 1
        assert "it writes eng_Latn (English)" in done.stderr
        assert done.stdout == ""

    def test_every_model_and_training_field_is_an_option(self):
        text = self.moe_edu("train", "--help").stdout
        for option in (
            "--num-experts",
            "--router-aux-loss-coef",
            "--seconds",
            "--encoder-sparse-step",
            "--resume",
        ):
            assert option in text

    def test_a_field_out_of_range_is_named(self, tmp_path):
        quick = ("--languages", "eng_Latn,fra_Latn", "--vocab-size", "600", "--steps", "1")
        done = self.moe_edu("train", "--out", str(tmp_path), *quick, "--encoder-attention-heads", "7")
        assert done.returncode == 1
        assert "encoder_attention_heads must divide" in done.stderr
