"""The solutions of lesson 03 do what the package's router does."""

import pytest
import torch

from moe_edu import MoEConfig, expert_capacity, top2_gating
from moe_edu.exercises import lesson_02
from moe_edu.exercises import lesson_03 as lesson
from moe_edu.exercises.capstone import Pieces, check_pieces
from moe_edu.exercises.registry import find_exercise
from moe_edu.moe.routing import queue_positions


def gating(seed, **options):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 6, generator=generator)
    padding = torch.rand(40, generator=generator) < 0.2
    return top2_gating(
        logits,
        capacity=7,
        second_expert_policy="random",
        padding=padding,
        generator=generator,
        **options,
    )


@pytest.mark.parametrize("seed", range(5))
def test_positions_and_gates(seed):
    routing = gating(seed)
    assert (routing.expert_index < 0).any()
    assert not routing.kept.all()
    position = lesson.queue_positions(routing.expert_index, 6)
    assert torch.equal(position, routing.position)
    assert torch.equal(position, queue_positions(routing.expert_index, 6))
    kept, gates = lesson.keep_and_weigh(routing.probs, routing.expert_index, position, 7)
    assert torch.equal(kept, routing.kept)
    assert torch.allclose(gates, routing.combine_weights)


def test_capacity():
    for factor in (0.5, 1.0, 1.25):
        for tokens, experts in ((1, 4), (100, 8), (33, 5)):
            config = MoEConfig(num_experts=experts, expert_capacity_factor=factor)
            assert lesson.training_capacity(tokens, experts, factor) == expert_capacity(tokens, config, True)


def test_the_smallest_capacity_drops_nothing_and_one_less_does():
    logits = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    expert_index = top2_gating(logits, capacity=30).expert_index
    smallest = lesson.smallest_capacity(expert_index, 5)
    assert top2_gating(logits, capacity=smallest).kept.all()
    assert not top2_gating(logits, capacity=smallest - 1).kept.all()


def test_places_by_priority():
    logits = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    routing = top2_gating(logits, capacity=30, batch_prioritized=True)
    assert torch.equal(lesson.first_places_by_priority(routing.probs), routing.position[:, 0])


def test_the_question():
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0]]).expand(64, 4)
    capacity = expert_capacity(64, MoEConfig(num_experts=4), training=True)
    dropped = ~top2_gating(logits, capacity=capacity).kept.any(dim=1)
    assert dropped.double().mean() == find_exercise("03.6").solution


def test_the_capstone_takes_the_solutions_of_lessons_02_and_03():
    check_pieces(
        Pieces(
            top2_choices=lesson_02.top2_choices,
            queue_positions=lesson.queue_positions,
            keep_and_weigh=lesson.keep_and_weigh,
        )
    )
