"""Lesson 06's solutions compute what the package computes."""

import pytest
import torch
from torch.nn import functional as F

from moe_edu import MoEEncoder
from moe_edu.exercises import lesson_06
from moe_edu.model.embedding import PositionTable
from moe_edu.model.layers import Attention, EncoderLayer
from moe_edu.model.layers import clamp_overflow as package_clamp

GENERATOR = torch.Generator().manual_seed(0)


def test_attention_shares(tiny_config):
    """The layer's own attention gives padding nothing, and the words the same shares."""
    torch.manual_seed(0)
    attention = Attention(tiny_config(d_model=4), num_heads=1)
    hidden, words = torch.randn(1, 5, 4), torch.tensor([True, True, True, False, False])
    bias = torch.zeros(5).masked_fill(~words, -torch.inf)
    memory = attention.project(hidden)
    _, shares = attention(hidden, memory, bias, output_weights=True)
    scores = attention.q_proj(hidden)[0] @ memory.key[0, 0].T / 2
    assert torch.allclose(lesson_06.attention_shares(scores, words), shares[0, 0], atol=1e-6)


def test_position_index():
    table = PositionTable(9, 4, padding_idx=1)
    for _ in range(20):
        words, _ = lesson_06._draw_words(GENERATOR)
        assert torch.equal(table(words), table.table[lesson_06.position_index(words, 1)])


def test_pre_norm_layer(tiny_config):
    """With one token and identity projections, attention adds its input, so the rest of the layer is compared."""
    config = tiny_config(d_model=8, encoder_attention_heads=1, encoder_ffn_dim=8)
    layer = EncoderLayer(config, sparse=False)
    x, w = torch.randn(1, 8), torch.randn(8, 8)
    with torch.no_grad():
        for module in layer.self_attn.children():
            module.weight.copy_(torch.eye(8))
            module.bias.zero_()
        layer.ffn.fc1.weight.copy_(w.T)
        layer.ffn.fc2.weight.copy_(torch.eye(8))
        layer.ffn.fc1.bias.zero_(), layer.ffn.fc2.bias.zero_()
    ours = lesson_06.pre_norm_layer(x, torch.ones(1, 1), w)
    assert torch.allclose(layer(x[None])[0][0], ours, atol=1e-5)
    assert not torch.allclose(ours, F.layer_norm(ours, (8,)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_clamp_overflow(dtype):
    hidden = torch.tensor([1e5, -1e5, 64_800.0, 3.0, float("nan")]).to(dtype)
    assert torch.equal(lesson_06.clamp_overflow(hidden).nan_to_num(7), package_clamp(hidden).nan_to_num(7))


def test_stack_experts(tiny_config):
    encoder = MoEEncoder(tiny_config(num_experts=12))
    stacked = lesson_06.stack_experts(encoder.hf_state_dict(), "layers.1.ffn.experts.", 12)
    assert torch.equal(stacked, encoder.layers[1].ffn.experts.w1)


def test_layer_drop():
    """NLLB Team 2022: 24 layers; `encoder_layerdrop` 0.05 in config.json of facebook/nllb-moe-54b."""
    (question,) = (exercise for exercise in lesson_06.EXERCISES if exercise.is_question)
    assert question.solution == pytest.approx(24 * (1 - 0.05))
