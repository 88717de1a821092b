"""Hugging Face's names in both directions, and safetensors files, some of them damaged."""

import json
import pickle

import pytest
import torch
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration, NllbMoeModel
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeEncoder

from moe_edu.config import MoEConfig
from moe_edu.model.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from moe_edu.model.encoder import MoEEncoder
from moe_edu.model.translator import MoETranslator

FIELDS = {
    "vocab_size": 13,
    "max_position_embeddings": 8,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 6,
    "decoder_ffn_dim": 10,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 3,
    "router_bias": True,
}
CONFIG = MoEConfig(**FIELDS)


@pytest.fixture
def reference() -> NllbMoeForConditionalGeneration:
    model = NllbMoeForConditionalGeneration(NllbMoeConfig(**FIELDS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_equal_tensors(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


def copy_state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class TestHuggingFaceNames:
    def test_round_trip_is_exact(self, reference):
        model = MoETranslator(CONFIG)
        model.load_hf_state_dict(reference.state_dict())
        assert_equal_tensors(model.hf_state_dict(), reference.state_dict())

        other = NllbMoeForConditionalGeneration(NllbMoeConfig(**FIELDS))
        other.load_state_dict(model.hf_state_dict())
        assert_equal_tensors(other.state_dict(), reference.state_dict())

    def test_experts_are_slices_of_the_stack(self, reference):
        model = MoETranslator(CONFIG)
        model.load_hf_state_dict(reference.state_dict())
        theirs = reference.model.encoder.layers[1].ffn.experts["expert_2"]
        ours = model.encoder.layers[1].ffn.experts
        for stack, tensor in (
            (ours.w1, theirs.fc1.weight),
            (ours.b1, theirs.fc1.bias),
            (ours.w2, theirs.fc2.weight),
            (ours.b2, theirs.fc2.bias),
        ):
            assert torch.equal(stack[2], tensor)

    def test_model_without_the_output_layer(self, reference):
        model = MoETranslator(CONFIG)
        inner = NllbMoeModel(NllbMoeConfig(**FIELDS))
        inner.load_state_dict(reference.model.state_dict())
        model.load_hf_state_dict(inner.state_dict())
        assert_equal_tensors(model.hf_state_dict(), reference.state_dict())

    def test_encoder_alone_and_out_of_a_whole_model(self, reference):
        expected = reference.model.encoder.state_dict()
        for state_dict in (expected, reference.model.state_dict(), reference.state_dict()):
            encoder = MoEEncoder(CONFIG)
            encoder.load_hf_state_dict(state_dict)
            assert_equal_tensors(encoder.hf_state_dict(), expected)

    def test_embedding_stored_once_or_several_times(self, reference):
        names = [name for name in reference.state_dict() if "embed_tokens" in name or "lm_head" in name]
        assert len(names) == 3
        once = {name: tensor for name, tensor in reference.state_dict().items() if name not in names}
        model = MoETranslator(CONFIG)
        model.load_hf_state_dict(once)
        assert_equal_tensors(model.hf_state_dict(), reference.state_dict())

    def test_position_tables_of_old_checkpoints_are_ignored(self, reference):
        state = reference.state_dict()
        state["model.encoder.embed_positions.weights"] = torch.zeros(10, 8)
        MoETranslator(CONFIG).load_hf_state_dict(state)

    def test_the_model_keeps_its_dtype(self, reference):
        model = MoETranslator(CONFIG).to(torch.bfloat16)
        model.load_hf_state_dict(reference.state_dict())
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.equal(model.shared.weight, reference.model.shared.weight.bfloat16())

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (
                lambda s: s.pop("model.encoder.layers.1.ffn.experts.expert_2.fc1.bias"),
                r"missing: encoder\.layers\.1\.ffn\.experts\.expert_2\.fc1\.bias",
            ),
            (
                lambda s: s.update({"model.encoder.layers.1.ffn.experts.expert_3.fc1.bias": torch.zeros(6)}),
                "unexpected: .*expert_3",
            ),
            (
                lambda s: s.update({"model.decoder.layer_norm.weight": torch.zeros(9)}),
                r"wrong shape: decoder\.layer_norm\.weight \[9\], expected \[8\]",
            ),
            (lambda s: s.update({"lm_head.weight": torch.zeros(13, 8)}), "differ"),
            (
                lambda s: s.update({"model.decoder.embed_tokens.weight": torch.zeros(13, 8)}),
                "differ",
            ),
            (lambda s: s.clear(), "missing: .* and .* more"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_changes_nothing(self, reference, spoil, message):
        state = dict(reference.state_dict())
        spoil(state)
        model = MoETranslator(CONFIG)
        before = copy_state(model)
        with pytest.raises(CheckpointError, match=message):
            model.load_hf_state_dict(state)
        assert_equal_tensors(model.state_dict(), before)


class TestFiles:
    @pytest.fixture
    def model(self) -> MoETranslator:
        return MoETranslator(CONFIG)

    def test_round_trip(self, model, tmp_path):
        save_checkpoint(model, CONFIG, tmp_path / "new" / "folder")
        config, tensors = read_checkpoint(tmp_path / "new" / "folder")
        assert config == model.config
        other = MoETranslator(config)
        other.load_hf_state_dict(tensors)
        assert_equal_tensors(other.state_dict(), model.state_dict())

    def test_the_embedding_is_stored_once_and_halves_take_half(self, model, tmp_path):
        save_checkpoint(model, CONFIG, tmp_path / "full")
        save_checkpoint(model, CONFIG, tmp_path / "half", dtype=torch.bfloat16)
        _, tensors = read_checkpoint(tmp_path / "full")
        assert sum(tensor.numel() for tensor in tensors.values()) == sum(
            p.numel() for p in model.parameters()
        )
        _, halves = read_checkpoint(tmp_path / "half")
        assert {tensor.dtype for tensor in halves.values()} == {torch.bfloat16}
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_transformers_reads_it(self, model, tmp_path):
        save_checkpoint(model, CONFIG, tmp_path)
        reference, info = NllbMoeForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_equal_tensors(model.hf_state_dict(), reference.state_dict())

    def test_an_encoder_alone_comes_back_with_its_embedding(self, model, tmp_path):
        """Its names are `NllbMoeEncoder`'s, so `transformers` reads it, too."""
        save_checkpoint(model.encoder, CONFIG, tmp_path)
        config, tensors = read_checkpoint(tmp_path)
        other = MoEEncoder(config)
        other.load_hf_state_dict(tensors)
        assert_equal_tensors(other.state_dict(), model.encoder.state_dict())
        reference, info = NllbMoeEncoder.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_equal_tensors(other.hf_state_dict(), reference.state_dict())

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_missing_file(self, model, tmp_path, name):
        save_checkpoint(model, CONFIG, tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            read_checkpoint(tmp_path)

    def test_missing_directory_says_what_to_do(self, tmp_path):
        with pytest.raises(CheckpointError, match="moe-edu train"):
            read_checkpoint(tmp_path / "nothing")

    @pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
    def test_truncated_weights(self, model, tmp_path, keep):
        save_checkpoint(model, CONFIG, tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        "damage", [lambda b: b"\xff" * 8 + b[8:], lambda b: b[:8] + b"x" + b[9:], lambda b: b + b"more"]
    )
    def test_damaged_weights(self, model, tmp_path, damage):
        save_checkpoint(model, CONFIG, tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", '{"d_model": "wide"}', '{"d_model": -1}', '{"model_type": "bart"}']
    )
    def test_damaged_configuration(self, model, tmp_path, text):
        save_checkpoint(model, CONFIG, tmp_path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_checkpoint(tmp_path)

    def test_a_pickle_is_never_loaded(self, model, tmp_path):
        save_checkpoint(model, CONFIG, tmp_path)
        proof = tmp_path / "executed"

        class Payload:
            def __reduce__(self):
                return (open, (str(proof), "w"))

        pickled = pickle.dumps(Payload())
        pickle.loads(pickled).close()
        assert proof.exists(), "loading the payload runs it"
        proof.unlink()
        for name in ("model.safetensors", "pytorch_model.bin"):
            (tmp_path / name).write_bytes(pickled)
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path)
        assert not proof.exists()

    def test_configuration_is_hugging_faces(self, model, tmp_path):
        save_checkpoint(model, CONFIG, tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())
        assert NllbMoeConfig(**values).num_experts == CONFIG.num_experts
