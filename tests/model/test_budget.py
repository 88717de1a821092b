"""The counts agree with real models: parameters with built models, FLOPs with PyTorch's counter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_edu import MoEConfig, MoEEncoder, MoETranslator
from moe_edu.model.budget import Parts, active_parameters, expert_parameters, forward_flops, stored_parameters

# The released model, as in its config.json; the other fields are MoEConfig's defaults.
NLLB_MOE = MoEConfig(
    vocab_size=256206,
    d_model=2048,
    encoder_layers=24,
    decoder_layers=24,
    encoder_ffn_dim=8192,
    decoder_ffn_dim=8192,
)
NLLB_DENSE = replace(NLLB_MOE, encoder_sparse_step=0, decoder_sparse_step=0)  # NLLB-200 3.3B
PART_OF_NAME = {
    "shared": "embedding",
    "embed_tokens": "embedding",
    "norm": "norms",
    "attn": "attention",
    "cross_attention": "attention",
    "router": "router",
    "experts": "experts",
    "ffn": "feed_forward",
}

configs = st.builds(
    MoEConfig,
    vocab_size=st.integers(5, 40),
    max_position_embeddings=st.just(8),
    d_model=st.sampled_from([4, 8, 12]),
    encoder_layers=st.integers(0, 5),
    decoder_layers=st.integers(0, 5),
    encoder_ffn_dim=st.integers(1, 20),
    decoder_ffn_dim=st.integers(1, 20),
    encoder_attention_heads=st.sampled_from([1, 2, 4]),
    decoder_attention_heads=st.sampled_from([1, 2, 4]),
    encoder_sparse_step=st.integers(-1, 4),
    decoder_sparse_step=st.integers(-1, 4),
    num_experts=st.integers(1, 9),
    router_bias=st.booleans(),
)


def counted(model):
    """The parameters of a real model, counted part by part by their names."""
    parts = dict.fromkeys(Parts._fields, 0)
    for name, parameter in model.named_parameters():
        parts[next(part for word, part in PART_OF_NAME.items() if word in name)] += parameter.numel()
    return Parts(**parts)


def built(kind, config):
    with torch.device("meta"):
        return kind(config)


class TestParameters:
    @given(configs)
    def test_of_a_translator_are_those_of_a_built_one(self, config):
        assert stored_parameters(config) == counted(built(MoETranslator, config))

    @given(configs)
    def test_of_an_encoder_are_those_of_a_built_one(self, config):
        assert stored_parameters(config, decoder=False) == counted(built(MoEEncoder, config))

    @given(configs)
    def test_active_ones_leave_out_experts_that_are_not_visited(self, config):
        stored, active = stored_parameters(config), active_parameters(config)
        assert stored._replace(experts=0) == active._replace(experts=0)
        assert active.experts * config.num_experts == stored.experts * min(2, config.num_experts)

    def test_of_one_expert(self):
        config = replace(NLLB_DENSE, d_model=16, encoder_ffn_dim=20, encoder_layers=1)
        dense = counted(built(MoEEncoder, config))
        assert expert_parameters(16, 20) == dense.feed_forward


class TestPublishedNumbers:
    def test_the_whole_model_has_54_5_billion(self):
        stored = stored_parameters(NLLB_MOE)
        assert f"{stored.total / 1e9:.1f}" == "54.5"
        assert stored == counted(built(MoETranslator, NLLB_MOE))

    def test_agrees_with_the_pruning_paper(self):
        """Koishekenov et al. 2022: 33.6M per expert, 51.6B in all experts, 101.5 GiB and 6.2 GiB in half precision."""
        assert f"{expert_parameters(2048, 8192) / 1e6:.1f}" == "33.6"
        assert f"{stored_parameters(NLLB_MOE).experts / 1e9:.1f}" == "51.6"
        assert f"{2 * stored_parameters(NLLB_MOE).total / 2**30:.1f}" == "101.5"
        assert f"{2 * stored_parameters(NLLB_DENSE).total / 2**30:.1f}" == "6.2"

    def test_the_dense_one_has_3_3_billion(self):
        assert f"{stored_parameters(NLLB_DENSE).total / 1e9:.1f}" == "3.3"


class TestFlops:
    def measured(self, model, *arguments):
        counter = FlopCounterMode(display=False)
        # PyTorch's counter does not know the CPU's fused attention: this computes the same with plain products.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model.eval()(*arguments)
        return counter.get_total_flops()

    @settings(max_examples=20)
    @given(configs, st.integers(1, 7))
    def test_of_an_encoder_are_what_pytorch_counts(self, config, S):
        ids = torch.randint(2, config.vocab_size, (1, S))
        assert forward_flops(config, S).total == self.measured(MoEEncoder(config), ids)

    @settings(max_examples=20)
    @given(configs, st.integers(1, 7), st.integers(1, 7))
    def test_of_a_translator_are_what_pytorch_counts(self, config, S, L):
        ids = torch.randint(2, config.vocab_size, (1, S))
        labels = torch.randint(2, config.vocab_size, (1, L))
        measured = self.measured(MoETranslator(config), ids, None, labels)
        assert forward_flops(config, S, L).total == measured

    def test_more_experts_cost_their_router_scores_only(self):
        few, many = (forward_flops(replace(NLLB_MOE, num_experts=experts), 30, 30) for experts in (2, 128))
        assert few._replace(router=0) == many._replace(router=0)
        assert many.router == 64 * few.router

    def test_a_short_sentence_costs_two_flops_per_parameter_that_it_uses(self):
        active = active_parameters(NLLB_MOE, decoder=False)
        weights = active.attention + active.feed_forward + active.router + active.experts
        assert forward_flops(NLLB_MOE, 1).total == pytest.approx(2 * weights, rel=1e-3)
