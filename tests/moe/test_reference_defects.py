"""Faults in `transformers` 4.57.6: each is shown in its code, and followed by the property of ours that excludes it.

Faults in the losses are in test_loss_defects.py. Release 5.x runs experts 0 and 1 only, whatever the router chose; it
cannot be installed together with 4.57.6, so only our property is tested (in test_experts.py, for every back end, too).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import (
    NllbMoeDecoderLayer,
    NllbMoeEncoder,
    NllbMoeEncoderLayer,
    NllbMoeSparseMLP,
    NllbMoeTop2Router,
)

from moe_edu.model.encoder import MoEEncoder
from moe_edu.model.layers import DecoderLayer, EncoderLayer
from moe_edu.moe.layer import SparseMLP
from moe_edu.moe.routing import Top2Router, top2_gating

D, E = 8, 4
seeds = st.integers(0, 2**31)


def reference_config(**fields) -> NllbMoeConfig:
    defaults = {
        "vocab_size": 29,
        "d_model": D,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 12,
        "encoder_sparse_step": 1,
        "encoder_layerdrop": 0.0,
        "num_experts": E,
        "expert_capacity": None,
        "moe_token_dropout": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.3,
        "attn_implementation": "eager",
    }
    return NllbMoeConfig(**{**defaults, **fields})


def reference_layer(**fields) -> NllbMoeSparseMLP:
    return NllbMoeSparseMLP(reference_config(**fields), ffn_dim=12)


def hidden_states(seed: int, B: int = 2, S: int = 8) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed))


# The layer of `transformers` takes its mask flat, or as an additive `[B, 1, S, S]`.
NO_PADDING = torch.zeros(16, dtype=torch.bool)


class TestCapacityIsKeptOnTheModule:
    def test_reference(self):
        layer, hidden = reference_layer(), hidden_states(0)
        with torch.no_grad():
            before = layer.train()(hidden, NO_PADDING)[0]
            fresh = reference_layer()
            fresh.load_state_dict(layer.state_dict())
            fresh.eval()(hidden, NO_PADDING)
            after = fresh.train()(hidden, NO_PADDING)[0]
        assert (layer.router.expert_capacity, fresh.router.expert_capacity) == (8, 16)
        assert not torch.allclose(before, after), "one eval pass changed the training step"

    @given(seeds)
    def test_ours(self, tiny_config, seed):
        layer, hidden = SparseMLP(tiny_config()), hidden_states(seed)
        before, routing = layer.train()(hidden)
        layer.eval()(hidden_states(seed, B=5))
        after, _ = layer.train()(hidden)
        assert torch.equal(after, before)
        assert routing.capacity == 8


class TestSamplingChangesTheCallersLogits:
    def test_reference(self):
        router = NllbMoeTop2Router(reference_config(second_expert_policy="sampling"))
        logits = torch.zeros(6, E)
        router.route_tokens(logits)
        assert logits.any()

    @given(seeds, st.sampled_from(["sampling", "random"]))
    def test_ours(self, seed, policy):
        logits = torch.randn(6, E, generator=torch.Generator().manual_seed(seed))
        before = logits.clone()
        top2_gating(logits, capacity=6, second_expert_policy=policy)
        assert torch.equal(logits, before)


class TestTheOptionalPaddingMask:
    def test_reference_crashes_without_it(self):
        with pytest.raises(AttributeError, match="'bool' object has no attribute 'shape'"):
            reference_layer()(hidden_states(0))

    def test_ours_routes_every_token(self, tiny_config):
        _, routing = SparseMLP(tiny_config()).eval()(hidden_states(0))
        assert routing.kept.all()
        assert routing.padding is None


class TestAMaskTheWrongWayRound:
    """The mask is 1 for real tokens, as everywhere else in the ecosystem, but the layer expects True for padding."""

    ATTENTION_MASK = torch.ones(2, 8, dtype=torch.long)

    def test_reference_silently_drops_every_token(self):
        output, _ = reference_layer()(hidden_states(0), self.ATTENTION_MASK.flatten())
        assert not output.any()

    @given(st.sampled_from([torch.long, torch.int, torch.uint8, torch.float]))
    def test_ours_says_so(self, tiny_config, dtype):
        with pytest.raises(ValueError, match="attention_mask == 0"):
            SparseMLP(tiny_config())(hidden_states(0), self.ATTENTION_MASK.to(dtype))

    def test_our_encoder_takes_the_ecosystems_mask(self, tiny_config):
        encoder = MoEEncoder(tiny_config()).eval()
        ids = torch.full((2, 8), 5)
        assert encoder(ids, self.ATTENTION_MASK).routing[1].kept.all()
        assert encoder(ids, self.ATTENTION_MASK.bool()).routing[1].kept.all()


class TestAGateThatUnderflows:
    """Two tokens prefer expert 0, which has room for one; the other's second choice has probability 0."""

    LOGITS = torch.tensor([[0.0, -900.0, -200.0, -900.0], [0.0, -200.0, -900.0, -900.0]])

    def test_reference_leaves_the_token_without_expert(self):
        router = NllbMoeTop2Router(reference_config(expert_capacity=1))
        _, weights = router.route_tokens(self.LOGITS.clone())
        assert weights[0].tolist() == [1, 0, 0, 0]
        assert weights[1].tolist() == [0, 0, 0, 0]

    def test_ours_keeps_it(self):
        routing = top2_gating(self.LOGITS, capacity=1)
        assert routing.kept.tolist() == [[True, True], [False, True]]
        assert routing.combine_matrix()[1].tolist() == [0, 1, 0, 0]

    @given(seeds, st.integers(1, 8), st.floats(1.0, 1000.0))
    def test_kept_never_depends_on_a_weight(self, seed, capacity, scale):
        """Scaling the logits keeps their order, so it keeps every decision, even where gates underflow."""
        logits = torch.randn(8, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        plain, scaled = (top2_gating(x, capacity=capacity) for x in (logits, scale * logits))
        assert torch.equal(scaled.kept, plain.kept)
        torch.testing.assert_close(scaled.combine_weights.sum(1), scaled.kept.any(1).double())


class TestTokensWithoutAnExpertAreReportedAsSentToExpertZero:
    """All tokens prefer expert 2, then 3; what this does to the balancing loss is in test_loss_defects.py."""

    LOGITS = torch.tensor([0.0, 0.0, 2.0, 1.0]).expand(6, E)
    PADDING = torch.tensor([False] * 4 + [True] * 2)

    def test_reference(self):
        router = NllbMoeTop2Router(reference_config(expert_capacity=3))
        top_1_mask, _ = router.route_tokens(self.LOGITS.clone(), padding_mask=self.PADDING)
        assert top_1_mask.argmax(-1).tolist() == [2, 2, 2, 0, 0, 0]

    def test_ours(self):
        routing = top2_gating(self.LOGITS, capacity=3, padding=self.PADDING)
        assert routing.expert_index[:, 0].tolist() == [2, 2, 2, 2, -1, -1]
        assert routing.kept[:, 0].tolist() == [True] * 3 + [False] * 3


class TestWhatIsReturnedAsRouterLogits:
    def test_reference_returns_combine_weights(self):
        """`output_router_logits=True` returns weights: never negative, at most two per row, and each row sums to 1."""
        encoder = NllbMoeEncoder(reference_config()).eval()
        ids = torch.randint(3, 29, (2, 6))
        returned, _ = encoder(ids, output_router_logits=True).router_probs[0]
        assert (returned >= 0).all()
        assert ((returned > 0).sum(-1) == 2).all()
        torch.testing.assert_close(returned.sum(-1), torch.ones(12))

    @given(seeds)
    def test_ours_are_the_routers_scores(self, tiny_config, seed):
        router, hidden = Top2Router(tiny_config(second_expert_policy="sampling")), hidden_states(seed)
        routing = router(hidden)
        torch.testing.assert_close(routing.logits, router.classifier(hidden).flatten(0, 1))
        torch.testing.assert_close(routing.probs, routing.logits.softmax(1))


class TestExpertOutputMasking:
    """`moe_token_dropout`: expert outputs masked in whole rows, unscaled (NLLB Team 2022, section 6.2.2)."""

    P = 0.4

    def test_reference_drops_single_elements_and_rescales_in_both_modes(self):
        masked, plain = reference_layer(moe_token_dropout=self.P), reference_layer()
        plain.load_state_dict(masked.state_dict())
        with torch.no_grad():
            for layer in (masked, plain):
                layer.router.expert_capacity = 10_000
                for expert in layer.experts.values():
                    expert.fc2.bias.fill_(10.0)  # so that no output is zero by chance
            hidden = hidden_states(0, B=1, S=1).expand(1, 4000, D)
            mask = torch.zeros(4000, dtype=torch.bool)
            full = plain.eval()(hidden, mask)[0][0, 0]
            in_eval = masked.eval()(hidden, mask)[0][0, 0]
            masked.router.expert_capacity = 10_000
            in_training = masked.train()(hidden, mask)[0][0]
        torch.testing.assert_close(in_eval, (1 - self.P) * full)
        # The mean in training is `full`, not `in_eval`.
        torch.testing.assert_close(in_training.mean(0), full, rtol=0.05, atol=0)
        partly = ((in_training == 0).sum(-1) > 0) & ((in_training == 0).sum(-1) < D)
        assert partly.any(), "some row is partly masked"

    @settings(max_examples=20)
    @given(seeds)
    def test_ours_drops_whole_rows_without_rescaling(self, tiny_config, seed):
        """With one choice per token, each output is the full value or zero."""
        masked = SparseMLP(tiny_config(moe_token_dropout=self.P, num_experts=1, expert_capacity=99))
        plain = SparseMLP(tiny_config(num_experts=1, expert_capacity=99))
        plain.load_state_dict(masked.state_dict())
        hidden = hidden_states(seed)
        full = plain(hidden)[0]
        output = masked.train()(hidden, generator=torch.Generator().manual_seed(seed))[0]
        is_full = (output == full).all(-1)
        is_zero = (output == 0).all(-1)
        assert (is_full | is_zero).all()
        torch.testing.assert_close(masked.eval()(hidden)[0], (1 - self.P) * full)


class TestGradientCheckpointing:
    """Older releases returned hidden states as routing; 4.57.6 no longer does, and neither do we."""

    @pytest.mark.parametrize("which", ["reference", "ours"])
    def test_routing_is_routing(self, tiny_config, which):
        ids = torch.randint(3, 29, (2, 6))
        if which == "reference":
            encoder = NllbMoeEncoder(reference_config()).train()
            encoder.gradient_checkpointing_enable()
            shapes = [weights.shape for weights, _ in encoder(ids, output_router_logits=True).router_probs]
        else:
            encoder = MoEEncoder(tiny_config(encoder_sparse_step=1, gradient_checkpointing=True)).train()
            shapes = [routing.combine_matrix().shape for routing in encoder(ids).routing]
        assert shapes == [(12, E)] * 2


class TestDropoutOnTheResidual:
    @pytest.mark.parametrize("layer", [NllbMoeEncoderLayer, NllbMoeDecoderLayer])
    @pytest.mark.parametrize("sparse", [False, True])
    def test_reference_uses_activation_dropout(self, layer, sparse):
        assert (
            layer(reference_config(dropout=0.3, activation_dropout=0.1), is_sparse=sparse).ff_dropout.p == 0.1
        )

    @pytest.mark.parametrize("layer", [EncoderLayer, DecoderLayer])
    @pytest.mark.parametrize("sparse", [False, True])
    def test_ours_uses_dropout(self, tiny_config, layer, sparse):
        assert layer(tiny_config(dropout=0.3, activation_dropout=0.1), sparse).ff_dropout.p == 0.3


@given(seeds)
def test_every_expert_that_is_chosen_runs(tiny_config, seed):
    """Release 5.x of `transformers` runs experts 0 and 1 only."""
    generator = torch.Generator().manual_seed(seed)
    layer = SparseMLP(tiny_config(num_experts=8)).eval()
    output, routing = layer(hidden_states(seed, S=20))
    output.backward(torch.randn(output.shape, generator=generator))
    chosen = torch.unique(routing.expert_index).tolist()
    ran = [e for e in range(8) if layer.experts.b2.grad[e].any()]
    assert ran == chosen
    assert len(chosen) > 2
