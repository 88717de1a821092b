"""The solutions of lesson 02 do what the package's router does."""

import math
import re

import torch

from moe_edu import top2_gating
from moe_edu.exercises import lesson_02 as lesson
from moe_edu.exercises.registry import find_exercise


def random_logits(tokens=50, experts=7, scale=3.0):
    return scale * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))


def gating(logits, **options):
    return top2_gating(logits, **{"capacity": len(logits), **options})


def test_choices_and_probabilities():
    for scale in (1.0, 300.0):
        logits = random_logits(scale=scale)
        routing = gating(logits)
        probs, expert_index = lesson.top2_choices(logits)
        assert torch.equal(probs, routing.probs)
        assert torch.equal(expert_index, routing.expert_index)
        assert torch.equal(lesson.second_choice(logits), routing.expert_index[:, 1])


def test_gates_before_dropping():
    routing = gating(random_logits(), capacity=9, normalize_before_dropping=True)
    assert not routing.kept.all()
    gates = lesson.gates_before_dropping(routing.probs, routing.expert_index, routing.kept)
    assert torch.allclose(gates, routing.combine_weights)


def test_sampling_has_the_packages_distribution():
    N, logits = 20_000, random_logits(1, 5, scale=1.0)
    many, generator = logits.expand(N, 5), torch.Generator().manual_seed(1)
    wanted = logits[0].scatter(0, logits.argmax(dim=1), -torch.inf).softmax(dim=0)
    drawn = lesson.sample_second(many, torch.rand(N, 5, generator=generator))
    ours = gating(many, second_expert_policy="sampling", generator=generator).expert_index[:, 1]
    for seconds in (drawn, ours):
        share = torch.bincount(seconds, minlength=5) / N
        assert torch.all((share - wanted).abs() <= 4 * (wanted * (1 - wanted) / N).sqrt())


def test_giving_up_is_the_packages():
    logits = random_logits()
    routing = gating(logits, second_expert_policy="random", generator=torch.Generator().manual_seed(2))
    u = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(2)).squeeze(1)
    given_up = lesson.give_up_unlikely(routing.probs, gating(logits).expert_index, u)
    assert torch.equal(given_up, routing.expert_index)


def test_the_formula_is_the_gradient_of_the_packages_gate():
    logits = random_logits().requires_grad_()
    gating(logits).combine_weights[:, 0].sum().backward()
    assert torch.allclose(lesson.gate_gradient(logits.detach()), logits.grad, atol=1e-6)


def test_the_question_has_the_answer_of_its_numbers():
    question = find_exercise("02.7")
    probs = sorted(map(float, re.findall(r"0\.\d+", question.task)))
    assert math.isclose(sum(probs), 1)
    assert math.isclose(2 * probs[-2], question.solution)
