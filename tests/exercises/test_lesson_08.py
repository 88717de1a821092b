"""The solutions of lesson 08 agree with the package's own functions."""

import pytest
import torch

from moe_edu.analysis import specialisation as analysis
from moe_edu.exercises import lesson_08
from moe_edu.moe.routing import top2_gating

draws = pytest.mark.parametrize("seed", range(10))


def drawn(key, seed):
    exercise = next(exercise for exercise in lesson_08.EXERCISES if exercise.key == key)
    return exercise.draw(torch.Generator().manual_seed(seed))


@draws
def test_load_matrix(seed):
    arguments = drawn("08.1", seed)
    assert torch.equal(lesson_08.load_matrix(*arguments), analysis.load_matrix(*arguments))


@draws
def test_mutual_information(seed):
    (counts,) = drawn("08.2", seed)
    assert float(lesson_08.mutual_information(counts)) == pytest.approx(
        analysis.mutual_information(counts), abs=1e-5
    )


@draws
def test_gates_without(seed, tiny_config):
    logits, removed = drawn("08.3", seed)
    routing = analysis.route_without(
        top2_gating(logits, capacity=len(logits)), [removed], tiny_config(num_experts=logits.shape[1])
    )
    assert torch.allclose(lesson_08.gates_without(logits, removed), routing.combine_matrix())


@draws
def test_experts_to_keep(seed):
    load, keep = drawn("08.4", seed)
    share = load / load.sum(1, keepdim=True)
    assert lesson_08.experts_to_keep(load, keep).tolist() == sorted(analysis.rank_by_activity(share)[:keep])


@draws
def test_chance(seed):
    labels, experts, order, G, E = drawn("08.5", seed)
    expected = analysis.mutual_information(analysis.load_matrix(labels[order], experts, G, E))
    assert float(lesson_08.chance(labels, experts, order, G, E)) == pytest.approx(expected, abs=1e-5)
