"""Counted memory is what tensors hold at one time."""

import torch

from moe_edu.lessons.memory import peak_bytes

MEGABYTE = 250_000  # float32 numbers


def test_counts_the_result():
    assert peak_bytes(lambda: torch.zeros(MEGABYTE)) == 1_000_000


def test_forgets_what_is_freed():
    def chain():
        x = torch.zeros(MEGABYTE)
        for _ in range(5):
            x = x + 1
        return x

    assert peak_bytes(chain) == 2_000_000


def test_views_and_in_place_results_cost_nothing():
    given = torch.zeros(500, 500)
    assert peak_bytes(lambda: given.mul_(2).view(-1)[:100]) == 0


def test_counts_what_backward_needs():
    weight = torch.ones(MEGABYTE, requires_grad=True)

    def step():
        y = (weight * 2).relu()
        y.backward(torch.ones_like(y))

    assert peak_bytes(step) >= 3_000_000
    assert weight.grad is not None
