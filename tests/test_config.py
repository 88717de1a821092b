"""Validation, and reading Hugging Face's configurations."""

import json
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch
from transformers import NllbMoeConfig

from moe_edu import MoEEncoder, MoETranslator, SparseMLP
from moe_edu.config import MoEConfig


def test_router_defaults_are_those_of_the_released_model():
    config = MoEConfig()
    assert (config.num_experts, config.encoder_sparse_step, config.decoder_sparse_step) == (128, 4, 4)
    assert config.second_expert_policy == "all"
    assert not config.normalize_router_prob_before_dropping
    assert not config.batch_prioritized_routing
    assert config.router_dtype == "float32"
    assert config.moe_eval_capacity_token_fraction == 1.0
    assert config.moe_token_dropout == 0.2
    assert config.router_aux_loss_coef == 0.01
    assert config.expert_capacity is None


def test_all_defaults_except_two_are_hugging_faces():
    reference = NllbMoeConfig()
    ours = {name: value for name, value in asdict(MoEConfig()).items() if hasattr(reference, name)}
    assert {name for name, value in ours.items() if value != getattr(reference, name)} == {
        "expert_capacity",
        "router_aux_loss_coef",
    }


def test_a_part_ignores_heads_that_it_does_not_use():
    config = MoEConfig(
        d_model=24,
        encoder_attention_heads=4,
        vocab_size=9,
        encoder_layers=1,
        encoder_ffn_dim=8,
        num_experts=2,
    )
    assert 24 % config.decoder_attention_heads != 0
    hidden = torch.randn(1, 3, 24)
    assert SparseMLP(config)(hidden)[0].shape == hidden.shape
    assert MoEEncoder(config)(torch.tensor([[3, 4, 5]])).last_hidden_state.shape == hidden.shape
    with pytest.raises(
        ValueError, match=r"MoEConfig\.decoder_attention_heads must divide d_model=24; got 16"
    ):
        MoETranslator(config)


def test_is_immutable():
    with pytest.raises(FrozenInstanceError):
        MoEConfig().d_model = 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("d_model", 0),
        ("num_experts", 0),
        ("max_position_embeddings", 0),
        ("encoder_layers", -1),
        ("decoder_layers", -1),
        ("encoder_ffn_dim", 0),
        ("decoder_ffn_dim", 0),
        ("encoder_attention_heads", 0),
        ("decoder_attention_heads", 0),
        ("dropout", 1.0),
        ("attention_dropout", -0.1),
        ("activation_dropout", float("nan")),
        ("moe_token_dropout", 1.0),
        ("encoder_layerdrop", 1.1),
        ("decoder_layerdrop", -0.1),
        ("expert_capacity", 0),
        ("expert_capacity_factor", 0.0),
        ("second_expert_policy", "best"),
        ("activation_function", "tanh"),
        ("router_dtype", "int64"),
        ("pad_token_id", 200_000),
        ("eos_token_id", -1),
        ("d_model", 1024.0),
        ("num_experts", True),
        ("encoder_sparse_step", None),
        ("expert_capacity", 2.5),
        ("dropout", "0.1"),
        ("router_bias", 1),
        ("expert_capacity_factor", float("inf")),
        ("max_position_embeddings", 10**9),
    ],
)
def test_refuses_values_out_of_range_and_names_the_field(field, value):
    with pytest.raises(ValueError, match=rf"MoEConfig\.{field} must .*; got"):
        MoEConfig(**{field: value})


@pytest.mark.parametrize(
    ("sparse_step", "sparse"),
    [(0, []), (-1, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (4, [3]), (6, [])],
)
def test_every_nth_layer_is_sparse(sparse_step, sparse):
    config = MoEConfig()
    assert [i for i in range(5) if config.is_sparse(i, sparse_step)] == sparse


def test_every_shared_field_has_hugging_faces_name_and_value():
    """A field that both have must keep its value; only the documented fields are ours alone."""
    reference = NllbMoeConfig(num_experts=6, expert_capacity=7, d_model=48, dropout=0.25, router_bias=True)
    config = MoEConfig.from_hf(reference.to_dict())
    ours_alone = {
        "expert_capacity_factor",
        "sample_in_eval",
        "elementwise_token_dropout",
        "activation_dropout_on_residual",
        "gradient_checkpointing",
    }
    for field, value in asdict(config).items():
        if field not in ours_alone:
            assert value == getattr(reference, field), field


def test_reads_a_dictionary_a_file_and_a_directory(tmp_path):
    values = NllbMoeConfig(num_experts=3).to_dict()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert MoEConfig.from_hf(values) == MoEConfig.from_hf(path) == MoEConfig.from_hf(str(tmp_path))


def test_a_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"num_experts": 3}', encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert MoEConfig.from_hf(path).num_experts == 3


def test_missing_configuration_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        MoEConfig.from_hf(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff", "[" * 100_000])
def test_damaged_configuration_is_a_value_error(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        MoEConfig.from_hf(path)


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match="m2m_100"):
        MoEConfig.from_hf({"model_type": "m2m_100"})
