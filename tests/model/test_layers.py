"""Layers: expert output masking, the residual path, attention, and fp16 overflow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_edu.model.layers import Attention, DecoderLayer, EncoderLayer, clamp_overflow
from moe_edu.moe.layer import FeedForward, SparseMLP


def run_sparse_mlp(layer: SparseMLP, hidden: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return layer(hidden, generator=torch.Generator().manual_seed(seed))[0]


class TestExpertOutputMasking:
    """`moe_token_dropout`: NLLB Team 2022, section 6.2.2."""

    @staticmethod
    def layers(tiny_config, p: float) -> tuple[SparseMLP, SparseMLP]:
        """Two layers, one with and one without masking, with equal weights and room for all choices."""
        torch.manual_seed(0)
        masked = SparseMLP(tiny_config(moe_token_dropout=p, expert_capacity=10_000))
        plain = SparseMLP(tiny_config(moe_token_dropout=0.0, expert_capacity=10_000))
        plain.load_state_dict(masked.state_dict())
        return masked, plain

    @staticmethod
    def gated_rows(layer: SparseMLP, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The contribution of each of a token's two experts."""
        routing, experts = layer.router(token[None, None]), layer.experts
        rows = []
        for e, gate in zip(routing.expert_index[0], routing.combine_weights[0], strict=True):
            inner = experts.act(experts.w1[e] @ token + experts.b1[e])
            rows.append(gate * (experts.w2[e] @ inner + experts.b2[e]))
        return rows[0], rows[1]

    def test_training_zeroes_whole_rows_and_rescales_nothing(self, tiny_config):
        """Each of a token's two contributions is present in full or not at all; all four cases occur."""
        masked, _ = self.layers(tiny_config, 0.4)
        hidden = torch.randn(1, 60, 8)
        seen = set()
        for token, output in zip(hidden[0], run_sparse_mlp(masked, hidden)[0], strict=True):
            first, second = self.gated_rows(masked, token)
            options = {
                (a, b): a * first + b * second
                for a, b in [(False, False), (False, True), (True, False), (True, True)]
            }
            fitting = [kept for kept, value in options.items() if torch.allclose(output, value, atol=1e-5)]
            assert fitting
            seen.add(fitting[0])
        assert len(seen) == 4

    def test_eval_multiplies_by_what_is_kept(self, tiny_config):
        masked, plain = self.layers(tiny_config, 0.4)
        hidden = torch.randn(2, 9, 8)
        torch.testing.assert_close(masked.eval()(hidden)[0], 0.6 * plain.eval()(hidden)[0])

    def test_the_mean_in_training_is_the_value_in_eval(self, tiny_config):
        p, n = 0.3, 4000
        masked, _ = self.layers(tiny_config, p)
        token = torch.randn(8)
        training_mean = run_sparse_mlp(masked.train(), token.expand(1, n, 8)).mean(1)[0]
        in_eval = masked.eval()(token[None, None])[0][0, 0]
        # The mean of n rows, each present with probability 1 - p, has the standard error |row| * sqrt(p * (1 - p) / n).
        first, second = self.gated_rows(masked, token)
        error = (first**2 + second**2).sqrt() * (p * (1 - p) / n) ** 0.5
        assert ((training_mean - in_eval).abs() <= 4 * error).all()
        # The test can distinguish a rescaled mean (that of `transformers`) from ours.
        assert ((in_eval / (1 - p) - in_eval).abs() > 8 * error).any()

    @pytest.mark.parametrize("training", [False, True])
    def test_the_references_masking_is_a_switch(self, tiny_config, training):
        config = tiny_config(moe_token_dropout=0.5, elementwise_token_dropout=True, expert_capacity=1000)
        layer = SparseMLP(config).train(training)
        torch.manual_seed(0)
        output = layer(torch.randn(1, 40, 8))[0]
        # In training single elements vanish; both choices' elements vanish at once in a quarter of the places.
        share = (output == 0).float().mean().item()
        assert share == pytest.approx(0.25 if training else 0.0, abs=0.1)

    def test_masking_repeats_with_the_generator(self, tiny_config):
        masked, _ = self.layers(tiny_config, 0.5)
        hidden = torch.randn(2, 9, 8)
        once, again, other = (run_sparse_mlp(masked, hidden, seed) for seed in (1, 1, 2))
        assert torch.equal(once, again)
        assert not torch.equal(once, other)


class TestSparseMLP:
    def test_a_token_without_an_expert_contributes_zero_and_the_residual_carries_it(self, tiny_config):
        torch.manual_seed(0)
        config = tiny_config(expert_capacity=1)
        layer = EncoderLayer(config, sparse=True)
        hidden = torch.randn(2, 6, 8)
        update, routing = layer.ffn(hidden)
        nobody = ~routing.kept.any(1).view(2, 6)
        assert nobody.any()
        assert not update[nobody].any()

        nn.init.zeros_(layer.self_attn.out_proj.weight)
        nn.init.zeros_(layer.self_attn.out_proj.bias)
        output, _, routing = layer(hidden)
        nobody = ~routing.kept.any(1).view(2, 6)
        assert nobody.any()
        assert torch.equal(output[nobody], hidden[nobody])
        assert (output[~nobody] != hidden[~nobody]).any(-1).all()

    def test_padding_gets_zero(self, tiny_config):
        layer = SparseMLP(tiny_config())
        mask = torch.tensor([[False, False, True], [True, True, True]])
        output, routing = layer(torch.randn(2, 3, 8), mask)
        assert not output[mask].any()
        assert output[~mask].any(-1).all()
        assert torch.equal(routing.padding, mask.flatten())

    @given(seed=st.integers(0, 2**31), size=st.tuples(st.integers(0, 3), st.integers(0, 6)))
    def test_the_callers_tensors_stay_as_they_are(self, tiny_config, seed, size):
        generator = torch.Generator().manual_seed(seed)
        layer = SparseMLP(tiny_config(moe_token_dropout=0.3, second_expert_policy="sampling"))
        hidden = torch.randn(*size, 8, generator=generator)
        mask = torch.rand(size, generator=generator) < 0.3
        hidden_before, mask_before = hidden.clone(), mask.clone()
        output, _ = layer(hidden, mask, generator)
        assert output.shape == hidden.shape
        assert torch.equal(hidden, hidden_before)
        assert torch.equal(mask, mask_before)

    def test_the_default_width_is_the_encoders(self, tiny_config):
        config = tiny_config()
        assert SparseMLP(config).experts.w1.shape == (4, config.encoder_ffn_dim, 8)
        assert SparseMLP(config, 3).experts.w1.shape == (4, 3, 8)

    def test_a_mask_that_is_not_bool_is_refused(self, tiny_config):
        with pytest.raises(ValueError, match="attention_mask == 0"):
            SparseMLP(tiny_config())(torch.zeros(1, 3, 8), torch.ones(1, 3, dtype=torch.long))


class TestAttention:
    def test_weights_on_request_change_nothing(self, tiny_config):
        torch.manual_seed(0)
        attention = Attention(tiny_config(), num_heads=2)
        hidden = torch.randn(3, 5, 8)
        bias = torch.zeros(3, 1, 1, 5).masked_fill(torch.rand(3, 1, 1, 5) < 0.3, torch.finfo(torch.float).min)
        fused, none = attention(hidden, attention.project(hidden), bias)
        output, weights = attention(hidden, attention.project(hidden), bias, output_weights=True)
        assert none is None
        torch.testing.assert_close(output, fused)
        assert weights.shape == (3, 2, 5, 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 5))

    def test_head_mask_scales_each_head(self, tiny_config):
        torch.manual_seed(0)
        attention = Attention(tiny_config(), num_heads=2)
        hidden = torch.randn(1, 5, 8)
        memory = attention.project(hidden)

        def masked(*heads: float) -> torch.Tensor:
            return attention(hidden, memory, head_mask=torch.tensor(heads))[0] - attention.out_proj.bias

        torch.testing.assert_close(masked(1, 1), attention(hidden, memory)[0] - attention.out_proj.bias)
        torch.testing.assert_close(masked(0, 0), torch.zeros(1, 5, 8))
        torch.testing.assert_close(masked(1, 0.5), masked(1, 0) + 0.5 * masked(0, 1))

    def test_dropout_acts_in_training_only(self, tiny_config):
        attention = Attention(tiny_config(attention_dropout=0.5), num_heads=2)
        hidden = torch.randn(1, 5, 8)
        memory = attention.project(hidden)
        for output_weights in (False, True):
            attention.train()
            torch.manual_seed(0)
            dropped = attention(hidden, memory, output_weights=output_weights)[0]
            attention.eval()
            assert not torch.allclose(dropped, attention(hidden, memory, output_weights=output_weights)[0])

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (
                lambda config: Attention(config, 6),
                "num_heads must divide d_model=8; got 6: choose a divisor, such as 2",
            ),
            (
                lambda config: EncoderLayer(config, sparse=False),
                r"MoEConfig\.encoder_attention_heads must divide d_model=8; got 3: choose a divisor, such as 1",
            ),
            (
                lambda config: DecoderLayer(config, sparse=False),
                r"MoEConfig\.decoder_attention_heads must divide d_model=8; got 12: choose a divisor, such as 4",
            ),
        ],
    )
    def test_heads_that_do_not_divide_the_width_are_refused(self, tiny_config, build, message):
        config = tiny_config(encoder_attention_heads=3, decoder_attention_heads=12)
        with pytest.raises(ValueError, match=message):
            build(config)


class TestHalfPrecisionOverflow:
    LIMIT = 65504.0 - 1000.0

    @pytest.mark.parametrize("sparse", [False, True])
    def test_encoder_layer_clamps_to_just_below_the_largest_number(self, tiny_config, sparse):
        layer = EncoderLayer(tiny_config(), sparse).half().eval()
        with torch.no_grad():
            (layer.ffn.experts.b2 if sparse else layer.ffn.fc2.bias).fill_(60000.0)
        hidden = torch.full((1, 3, 8), 60000.0, dtype=torch.float16)
        output, _, _ = layer(hidden)
        assert (output == torch.tensor(self.LIMIT, dtype=torch.float16)).all()

    def test_decoder_layer_clamps_too(self, tiny_config):
        layer = DecoderLayer(tiny_config(), sparse=False).half()
        with torch.no_grad():
            layer.ffn.fc2.bias.fill_(-60000.0)
        hidden = torch.full((1, 3, 8), -60000.0, dtype=torch.float16)
        output, *_ = layer(hidden, torch.zeros(1, 2, 8, dtype=torch.float16))
        assert (output == -torch.tensor(self.LIMIT, dtype=torch.float16)).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_dtypes_pass(self, dtype):
        hidden = torch.tensor([1e30, -1e30], dtype=dtype)
        assert clamp_overflow(hidden) is hidden


class TestDropoutPlacement:
    def test_the_feed_forward_residual_uses_dropout(self, tiny_config):
        config = tiny_config(dropout=0.25, activation_dropout=0.5)
        assert EncoderLayer(config, sparse=False).ff_dropout.p == 0.25
        assert DecoderLayer(config, sparse=True).ff_dropout.p == 0.25
        like_reference = tiny_config(
            dropout=0.25, activation_dropout=0.5, activation_dropout_on_residual=True
        )
        assert EncoderLayer(like_reference, sparse=False).ff_dropout.p == 0.5
        assert DecoderLayer(like_reference, sparse=True).ff_dropout.p == 0.5

    def test_activation_dropout_is_inside_the_dense_network(self, tiny_config):
        torch.manual_seed(0)
        ffn = FeedForward(tiny_config(activation_dropout=0.5), 64)
        hidden = torch.randn(1, 3, 8)
        assert not torch.equal(ffn.train()(hidden), ffn(hidden))
        assert torch.equal(ffn.eval()(hidden), ffn(hidden))
