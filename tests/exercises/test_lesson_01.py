"""The shown solutions are what the package and PyTorch compute."""

import pytest
import torch
from torch.nn import functional as F

from moe_edu import MoEConfig, SparseMLP
from moe_edu.exercises.lesson_01 import (
    attend,
    layer_norm,
    sparse_ffn,
    sparse_layer_size,
    sparse_layers,
)
from moe_edu.model.budget import active_parameters, expert_parameters


def config(**fields):
    sizes = {"d_model": 8, "encoder_ffn_dim": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return MoEConfig(**{**sizes, **fields})


def test_layer_norm_is_pytorchs():
    hidden, weight, bias = torch.randn(5, 8), torch.randn(8), torch.randn(8)
    torch.testing.assert_close(layer_norm(hidden, weight, bias), F.layer_norm(hidden, (8,), weight, bias))


def test_attend_is_pytorchs():
    query, key, value = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3, 8)
    expected = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
    torch.testing.assert_close(attend(query, key, value), expected)


@pytest.mark.parametrize("num_experts", [2, 5])
def test_sparse_layer_size_is_that_of_a_layer(num_experts):
    layer = SparseMLP(config(num_experts=num_experts))
    stored, used = sparse_layer_size(8, 12, num_experts)
    assert stored == sum(parameter.numel() for parameter in layer.parameters())
    active = active_parameters(config(num_experts=num_experts, encoder_sparse_step=12), decoder=False)
    assert used == active.experts + active.router == 2 * expert_parameters(8, 12) + 8 * num_experts


def test_sparse_ffn_is_the_packages_with_one_choice():
    layer = SparseMLP(config(num_experts=3, moe_token_dropout=0.0)).eval()
    hidden = torch.randn(1, 6, 8)
    _, routing = layer(hidden)
    w1, w2 = layer.experts.w1, layer.experts.w2
    outputs = [sparse_ffn(hidden[0], routing.expert_index[:, k], w1, w2) for k in range(2)]
    mixed = sum(routing.combine_weights[:, k, None] * outputs[k][0] for k in range(2))
    torch.testing.assert_close(mixed, layer(hidden)[0][0])
    assert [rows for _, rows in outputs] == [6, 6]


@pytest.mark.parametrize("step", range(-1, 6))
def test_sparse_layers_are_the_configurations(step):
    assert sparse_layers(12, step) == [layer for layer in range(12) if config().is_sparse(layer, step)]
