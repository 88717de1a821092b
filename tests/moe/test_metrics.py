"""Router metrics compared with loops, worked examples, and a defect of `transformers`."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_edu.moe.losses import MoELoss, moe_loss, summarize_metrics
from moe_edu.moe.metrics import ExpertMetrics, collect_metrics
from moe_edu.moe.router_losses import load_balancing_loss, router_z_loss
from moe_edu.moe.routing import RouterOutput, top2_gating

LOGITS = torch.arange(24.0).reshape(2, 4, 3)
TARGETS = torch.tensor([[1, 2, 1, 0], [0, 1, 0, 2]])


def layer(auxiliary_loss=0.2, router_z=0.1, left_behind=0.1, usage=0.9, confidence=0.5) -> ExpertMetrics:
    values = (auxiliary_loss, router_z, left_behind, usage, confidence)
    return ExpertMetrics(*(torch.tensor(value) for value in values))


def slow_statistics(routing: RouterOutput) -> tuple[float, float, float]:
    """fraction_tokens_left_behind, expert_usage and router_confidence, computed one token at a time."""
    real = [t for t in range(routing.num_tokens) if routing.padding is None or not routing.padding[t]]
    kept = [(t, k) for t in real for k in range(routing.kept.shape[1]) if routing.kept[t, k]]
    carried = {t for t, _ in kept}
    places = routing.num_experts * routing.capacity
    confidence = sum(routing.probs[t, routing.expert_index[t, k]].item() for t, k in kept)
    return (
        sum(t not in carried for t in real) / max(len(real), 1),
        len(kept) / max(places, 1),
        confidence / max(len(kept), 1),
    )


@st.composite
def routings(draw) -> RouterOutput:
    T, E = draw(st.integers(0, 12)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    padding = torch.rand(T, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    return top2_gating(
        2 * torch.randn(T, E, generator=generator),
        capacity=draw(st.integers(0, 6)),
        second_expert_policy=draw(st.sampled_from(["all", "random"])),
        padding=draw(st.sampled_from([padding, None])),
        generator=generator,
    )


class TestExpertMetrics:
    @settings(max_examples=60, deadline=None)
    @given(routings(), st.sampled_from(["first", "all"]))
    def test_agrees_with_the_loops(self, routing, choices):
        metrics = ExpertMetrics.from_routing(routing, choices)
        assert metrics[2:] == pytest.approx(slow_statistics(routing))
        expected = load_balancing_loss(routing.probs, routing.expert_index, routing.padding, choices)
        assert metrics.auxiliary_loss == expected
        assert metrics.router_z_loss == router_z_loss(routing.logits, routing.padding)
        assert all(value.shape == () and value.dtype == torch.float32 for value in metrics)
        assert all(0 <= value <= 1 for value in metrics[2:])

    def test_worked_example(self):
        """Three tokens and one of padding; E = 3 experts with C = 1 slot each, and two choices per token."""
        probs = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.5, 0.4, 0.1], [0.9, 0.1, 0.0]])
        padding = torch.tensor([False, False, False, True])
        metrics = ExpertMetrics.from_routing(top2_gating(probs.log(), capacity=1, padding=padding))
        # Experts 0 and 1 have room for token 0 only, expert 2 for token 1; token 2 finds none.
        assert metrics.fraction_tokens_left_behind.item() == pytest.approx(1 / 3)
        assert metrics.expert_usage.item() == pytest.approx(3 / 3)
        assert metrics.router_confidence.item() == pytest.approx((0.7 + 0.2 + 0.3) / 3)
        # All three first choices are expert 0, whose mean probability is 0.6.
        assert metrics.auxiliary_loss.item() == pytest.approx(3 * 1.0 * 0.6)

    @settings(max_examples=60, deadline=None)
    @given(routings(), st.sampled_from(["first", "all"]))
    def test_the_balancing_loss_counts_choices_before_capacity(self, routing, choices):
        unlimited, full = (
            dataclasses.replace(routing, kept=kept, position=position, capacity=capacity)
            for kept, position, capacity in [
                (routing.expert_index >= 0, routing.position, max(routing.num_tokens, 1)),
                (torch.zeros_like(routing.kept), routing.position, 0),
            ]
        )
        a, b = (ExpertMetrics.from_routing(value, choices) for value in (unlimited, full))
        assert a.auxiliary_loss == b.auxiliary_loss
        assert b.fraction_tokens_left_behind == float(routing.num_tokens > 0 and not _all_padded(routing))

    def test_padded_tokens_change_no_metric(self):
        logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
        padding = torch.tensor([False, True, False, False, True, False])
        with_pads = ExpertMetrics.from_routing(top2_gating(logits, capacity=2, padding=padding))
        without = ExpertMetrics.from_routing(top2_gating(logits[~padding], capacity=2))
        torch.testing.assert_close(tuple(with_pads), tuple(without))

    def test_only_the_losses_have_a_gradient(self):
        logits = torch.randn(6, 4, requires_grad=True)
        metrics = ExpertMetrics.from_routing(top2_gating(logits, capacity=2))
        assert [value.requires_grad for value in metrics] == [True, True, False, False, False]

    def test_a_choice_whose_gate_underflows_still_counts_as_routed(self):
        """exp(-200) is 0 in fp32. `transformers` infers routing from gates above 0 and loses the choice."""
        from transformers import NllbMoeConfig  # imported here, since this file's GPU tests do not need it
        from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

        logits = torch.tensor([[200.0, 0.0, -1.0, -2.0]])
        config = NllbMoeConfig(num_experts=4, expert_capacity=4, hidden_size=8)
        _, gates = NllbMoeTop2Router(config).route_tokens(logits.clone())
        assert gates.bool().sum().item() == 1

        routing = top2_gating(logits, capacity=4)
        assert routing.combine_weights.tolist() == [[1.0, 0.0]]
        metrics = ExpertMetrics.from_routing(routing)
        assert metrics.expert_usage.item() == 2 / 16
        assert metrics.router_confidence.item() == 0.5

    def test_dense_and_dropped_layers_are_skipped(self):
        routing = top2_gating(torch.randn(6, 4), capacity=6)
        collected = collect_metrics([None, routing, None, routing], choices="all")
        assert collected == (ExpertMetrics.from_routing(routing, "all"),) * 2
        assert collect_metrics([None]) == ()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    def test_losses_and_metrics_never_wait_for_the_device(self):
        device = "cuda"
        logits = torch.randn(64, 8, device=device, requires_grad=True)
        routing = top2_gating(logits, capacity=8, padding=torch.arange(64, device=device) > 50)
        targets = TARGETS.to(device)
        target_logits = LOGITS.to(device).requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            metrics = collect_metrics([routing, None])
            loss = moe_loss(
                target_logits,
                targets,
                expert_metrics=metrics,
                router_z_loss_coef=0.001,
                label_smoothing=0.1,
                z_loss=0.1,
                loss_normalizing_factor="average_per_sequence",
                segment_ids=targets,
            )
            summarize_metrics(metrics, loss, num_target_tokens=targets.numel())
            loss.total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _all_padded(routing: RouterOutput) -> bool:
    return routing.padding is not None and bool(routing.padding.all())


class TestSummary:
    def test_t5x_known_summary(self):
        """`test_expert_metrics` of `t5x/contrib/moe/models_test.py`."""
        total, z_loss, aux, router_z = (torch.tensor(value) for value in (100.0, 1.0, 3.0, 7.0))
        loss = MoELoss(
            total=total,
            cross_entropy=total - z_loss - aux - router_z,
            z_loss=z_loss,
            weighted_load_balancing_loss=aux,
            weighted_router_z_loss=router_z,
            load_balancing_loss=torch.tensor(1.5),
            router_z_loss=torch.tensor(0.5),
            weight_sum=torch.tensor(2.0),
        )
        layers = [layer(1.0, 0.0, 1.0, 0.7, 0.5), layer(2.0, 1.0, 0.5, 0.5, 0.5)]
        summary = summarize_metrics(layers, loss, num_target_tokens=2)
        assert {name: value.item() for name, value in summary.items()} == pytest.approx(
            {
                "cross_ent_loss": 89.0,
                "cross_ent_loss_per_all_target_tokens": 44.5,
                "experts/auxiliary_loss": 3.0,
                "experts/expert_usage": 0.6,
                "experts/fraction_tokens_left_behind": 0.75,
                "experts/router_confidence": 0.5,
                "experts/router_z_loss": 7.0,
            }
        )

    def test_cross_entropy_is_the_total_minus_every_other_term(self):
        layers = [layer(1.0, 0.0), layer(2.0, 1.0)]
        for metrics in layers:
            metrics.auxiliary_loss.requires_grad_()
            metrics.router_z_loss.requires_grad_()
        loss = moe_loss(
            LOGITS.clone().requires_grad_(),
            TARGETS,
            expert_metrics=layers,
            router_aux_loss_coef=0.1,
            router_z_loss_coef=10.0,
            z_loss=0.1,
        )
        summary = summarize_metrics(layers, loss, num_target_tokens=TARGETS.numel())
        rest = loss.total - loss.z_loss - 0.15 - 5.0
        torch.testing.assert_close(summary["cross_ent_loss"], rest.detach())
        torch.testing.assert_close(summary["cross_ent_loss_per_all_target_tokens"], rest.detach() / 8)
        assert summary["experts/auxiliary_loss"].item() == pytest.approx(0.15)
        assert summary["experts/router_z_loss"].item() == pytest.approx(5.0)
        assert not any(value.requires_grad for value in summary.values())

    def test_a_dense_model_has_no_expert_metrics(self):
        loss = moe_loss(LOGITS, TARGETS, expert_metrics=(), router_aux_loss_coef=0.0)
        summary = summarize_metrics((), loss, num_target_tokens=8)
        assert set(summary) == {"cross_ent_loss", "cross_ent_loss_per_all_target_tokens"}

    def test_no_target_tokens_are_refused(self):
        loss = moe_loss(LOGITS, TARGETS, expert_metrics=[layer()])
        with pytest.raises(ValueError, match="at least 1, not 0"):
            summarize_metrics([layer()], loss, num_target_tokens=0)
