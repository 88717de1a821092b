"""The solutions of lesson 05 do what moe_edu's own functions do."""

import math

import pytest
import torch

from moe_edu import ExpertMetrics, load_balancing_loss, router_z_loss, top2_gating, weighted_cross_entropy
from moe_edu.exercises.lesson_05 import (
    _published_mean_probability,
    balancing_loss,
    left_behind,
    mean_probability,
    router_confidence,
    router_z,
    smoothed_loss,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("tokens", "experts"), [(1, 2), (7, 4), (30, 5)])
def test_router_losses_are_those_of_the_package(tokens, experts):
    routing = top2_gating(3 * random(tokens, experts), capacity=2)
    ours = balancing_loss(routing.probs, routing.expert_index)
    assert torch.isclose(ours, load_balancing_loss(routing.probs, routing.expert_index))
    assert torch.isclose(router_z(routing.logits), router_z_loss(routing.logits))
    counted = torch.bincount(routing.expert_index[:, 0], minlength=experts) / tokens
    assert torch.isclose(ours, experts * (counted * mean_probability(routing.logits)).sum())


def test_the_published_mean_is_constant():
    assert torch.allclose(_published_mean_probability(random(6, 4)), torch.tensor(0.5))


def test_smoothing_is_t5xs_without_its_constant():
    logits, targets, smoothing = random(3, 5), torch.tensor([4, 0, 2]), 0.1
    low = smoothing / 4
    entropy = -(0.9 * math.log(0.9) + 4 * low * math.log(low))
    ours = smoothed_loss(logits.log_softmax(dim=1), targets, smoothing) - entropy
    theirs = weighted_cross_entropy(logits[None], targets[None], torch.ones(1, 3), smoothing)
    assert torch.isclose(ours.sum(), theirs.total)


def test_metrics_are_those_of_the_package():
    padding = torch.arange(20) % 4 == 3
    routing = top2_gating(random(20, 4), capacity=3, padding=padding)
    metrics = ExpertMetrics.from_routing(routing)
    assert torch.isclose(left_behind(routing.kept, padding), metrics.fraction_tokens_left_behind)
    confidence = router_confidence(routing.probs, routing.expert_index.clamp(min=0), routing.kept)
    assert torch.isclose(confidence, metrics.router_confidence)
