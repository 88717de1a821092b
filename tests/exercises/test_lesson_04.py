"""The solutions of lesson 04 do what moe_edu's own functions do."""

import pytest
import torch

from moe_edu.exercises.lesson_04 import EXERCISES, combine, dispatch, expert_starts, kept_choices, pad_rows
from moe_edu.moe.dispatch import permute, plan_dispatch, unpermute
from moe_edu.moe.routing import top2_gating


@pytest.fixture(params=[(7, 4, 2), (16, 3, 4), (1, 2, 1), (5, 8, 5)], ids=str)
def routing(request):
    tokens, experts, capacity = request.param
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    padding = torch.arange(tokens) % 5 == 4
    return top2_gating(logits, capacity=capacity, padding=padding)


def test_dispatch_and_combine_are_those_of_the_package(routing):
    hidden = torch.randn(routing.num_tokens, 3, generator=torch.Generator().manual_seed(0))
    rows, order, counts = dispatch(hidden, routing.expert_index, routing.kept, routing.num_experts)
    plan = plan_dispatch(routing)
    ours = permute(hidden, plan)
    assert torch.equal(order, plan.order[: len(order)])
    assert torch.equal(counts, plan.counts)
    assert torch.equal(rows, ours[: len(order)])
    home = combine(rows * 2, order, routing.combine_weights)
    assert torch.allclose(home, unpermute(ours * 2, routing.combine_weights, plan))


def test_kept_choices_are_the_routers(routing):
    kept = kept_choices(routing.combine_weights, routing.position, routing.capacity)
    assert torch.equal(kept, routing.kept)


def test_padded_slots_hold_each_experts_rows():
    counts = torch.tensor([2, 0, 3])
    rows = torch.arange(1.0, 6.0)[:, None]
    slots = pad_rows(rows, counts, capacity=4)
    assert slots[..., 0].tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [3, 4, 5, 0]]
    assert expert_starts(counts).tolist() == [0, 2, 2]


def test_the_price_is_the_product():
    (price,) = (exercise.solution for exercise in EXERCISES if exercise.key == "04.5")
    assert price * 1e6 == torch.empty(128, 8192, 2048, dtype=torch.bfloat16, device="meta").nbytes
