"""The router that trains in the page follows the gradient of the package's losses, and does what its lesson says."""

import numpy as np
import pytest
import torch

from moe_edu import explorers, load_balancing_loss, router_z_loss
from moe_edu.explorers.router_training import (
    EXPLORER,
    LEARNING_RATE,
    NUM_EXPERTS,
    SEEDS,
    first_weights,
    inputs,
    step,
    train,
    view,
)

each_seed = pytest.mark.parametrize("seed", range(1, SEEDS + 1))


@each_seed
def test_follows_the_gradient_of_the_packages_losses(seed):
    x, weights = inputs(0.7), first_weights(seed)
    router, vectors = (torch.tensor(part, requires_grad=True) for part in weights)
    measured, after = step(x, weights, 0.3, 0.05)

    words = torch.tensor(x)
    logits = words @ router.T
    probs = logits.softmax(dim=1)
    gate, expert = probs.max(dim=1)
    error = (gate[:, None] * vectors[expert] - words).square().sum(dim=1).mean()
    balance, z = load_balancing_loss(probs, expert[:, None]), router_z_loss(logits)
    (error + 0.3 * balance + 0.05 * z).backward()

    assert [measured.error, measured.balance, measured.z] == pytest.approx(
        [error.item(), balance.item(), z.item()]
    )
    assert np.allclose(after.router, weights.router - LEARNING_RATE * router.grad.numpy(), atol=1e-7)
    assert np.allclose(after.vectors, weights.vectors - LEARNING_RATE * vectors.grad.numpy(), atol=1e-7)


def alive(**weights):
    return [view(EXPLORER.state(seed=seed, **weights))["alive"] for seed in range(1, SEEDS + 1)]


def test_every_seed_collapses_where_words_share_a_part_and_nothing_balances():
    assert alive(shared=1.0, balance=0.0) == [1] * SEEDS


def test_no_seed_collapses_without_a_shared_part():
    assert min(alive(shared=0.0, balance=0.0)) >= 2


def test_enough_balancing_keeps_every_expert_in_every_seed():
    assert alive(shared=1.0, balance=0.5) == [NUM_EXPERTS] * SEEDS


@each_seed
def test_balancing_pays_here_and_the_z_loss_is_obeyed(seed):
    collapsed, balanced, small = (
        train(balance, z, 1.0, seed)[-1] for balance, z in ((0.0, 0.0), (0.5, 0.0), (0.5, 0.05))
    )
    assert balanced.error < collapsed.error
    assert small.z < balanced.z / 4


def test_steps_do_not_change_what_they_are_given():
    x, weights = inputs(1.0), first_weights(1)
    before = [part.copy() for part in weights]
    step(x, weights, 0.1, 0.1)
    assert all(map(np.array_equal, weights, before))


def test_a_small_coefficient_brings_a_second_expert_back():
    """What lesson 05 says of seed 1."""
    explorer = explorers.get("router_training")
    assert explorer.view(explorer.state(seed=1, balance=0.0))["alive"] == 1
    assert explorer.view(explorer.state(seed=1, balance=0.05))["alive"] == 2
