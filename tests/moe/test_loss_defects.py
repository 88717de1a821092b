"""Faults in the losses of `transformers` 4.57.6, compared with ours; more in test_reference_defects.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP, load_balancing_loss_func

from moe_edu.moe.losses import moe_loss
from moe_edu.moe.metrics import ExpertMetrics
from moe_edu.moe.router_losses import load_balancing_loss
from moe_edu.moe.routing import top2_gating

LOGITS = torch.arange(24.0).reshape(2, 4, 3)
TARGETS = torch.tensor([[1, 2, 1, 0], [0, 1, 0, 2]])
METRICS = ExpertMetrics(torch.tensor(0.2), torch.tensor(0.1), *torch.zeros(3).unbind())
REFERENCE_CONFIG = {
    "vocab_size": 20,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
    "num_experts": 4,
    "router_bias": False,
    "dropout": 0.0,
}


def gradient(value: Tensor, wrt: Tensor) -> Tensor:
    return torch.autograd.grad(value, wrt)[0]


class TestDefectsOfTheReference:
    """`transformers` 4.57.6 first, then ours; `REFERENCE_CONFIG` has E = 4."""

    def test_balancing_loss_sees_every_sparse_layer(self):
        E, T = 4, 8
        even = torch.arange(T) % E
        collapsed = torch.zeros(T, dtype=torch.long)
        uniform = torch.full((T, E), 1 / E, requires_grad=True)
        peaked = F.one_hot(collapsed, E).float().requires_grad_()

        def reference(*layers):
            router_probs, expert_indexes = NllbMoeForConditionalGeneration._unpack_router_logits(None, layers)
            return load_balancing_loss_func(router_probs, expert_indexes)

        balanced_model = reference((uniform, even), (uniform, even))
        half_collapsed = reference((uniform, even), (peaked, collapsed))
        assert half_collapsed == balanced_model
        assert not gradient(half_collapsed, peaked).any()

        def ours(*layers):
            metrics = [
                METRICS._replace(auxiliary_loss=load_balancing_loss(probs, index[:, None]))
                for probs, index in layers
            ]
            return moe_loss(LOGITS, TARGETS, expert_metrics=metrics).load_balancing_loss

        assert ours((uniform, even), (uniform, even)).item() == pytest.approx(1)
        half_collapsed = ours((uniform, even), (peaked, collapsed))
        assert half_collapsed.item() == pytest.approx((1 + E) / 2)
        assert gradient(half_collapsed, peaked).any()

    @pytest.mark.parametrize("reason", ["padded", "dropped"])
    def test_tokens_without_an_expert_are_not_counted_for_expert_zero(self, reason):
        """Every token prefers expert 1, then 2; half are padding, or find no room. No token chooses expert 0."""
        T, E = 8, 4
        capacity = T if reason == "padded" else T // 2
        padding = torch.arange(T) >= T // 2 if reason == "padded" else torch.zeros(T, dtype=torch.bool)
        router_logits = torch.tensor([0.0, 3.0, 2.0, 1.0]).expand(T, E)

        reference = NllbMoeSparseMLP(NllbMoeConfig(**REFERENCE_CONFIG, expert_capacity=capacity), ffn_dim=8)
        hidden = torch.ones(1, T, 8)
        reference.router.classifier.weight.data = (router_logits[0] / 8)[:, None].expand(E, 8).clone()
        _, (_, expert_index) = reference(hidden, padding)
        assert expert_index.bincount(minlength=E).tolist() == [T // 2, T // 2, 0, 0]

        routing = top2_gating(router_logits, capacity=capacity, padding=padding)
        probs = routing.probs.clone().requires_grad_()
        grad = gradient(load_balancing_loss(probs, routing.expert_index, padding), probs)
        share_of_first_choices = grad.sum(0) / E  # dL/dP_e = E * f_e
        torch.testing.assert_close(share_of_first_choices, torch.tensor([0.0, 1.0, 0.0, 0.0]))

    def test_z_loss_coefficient_is_used(self):
        def reference(coefficient):
            torch.manual_seed(0)
            config = NllbMoeConfig(
                **REFERENCE_CONFIG, router_z_loss_coef=coefficient, output_router_logits=True
            )
            model = NllbMoeForConditionalGeneration(config).eval()
            ids = torch.tensor([[5, 6, 7, 2]])
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss

        assert reference(0.0) == reference(1000.0)

        def ours(coefficient):
            return moe_loss(LOGITS, TARGETS, expert_metrics=[METRICS], router_z_loss_coef=coefficient).total

        torch.testing.assert_close(ours(1000.0) - ours(0.0), torch.tensor(100.0))
