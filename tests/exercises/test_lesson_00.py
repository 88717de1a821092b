"""The shown solutions are what the package computes."""

import pytest
import torch

from moe_edu.analysis.six_words import six_words
from moe_edu.exercises.lesson_00 import EXERCISES, busiest_expert, gate
from moe_edu.moe.routing import top2_gating


def test_the_six_words_make_as_many_choices_as_asked():
    routing = top2_gating(six_words().logits, capacity=6)
    assert EXERCISES[0].solution == routing.kept.sum()


@pytest.mark.parametrize("scores", [(1.0, -0.5), (-2.0, 3.0), (0.0, 0.0)])
def test_gate_is_the_routers(scores):
    routing = top2_gating(torch.tensor([scores]), capacity=1)
    assert gate(*scores) == pytest.approx(routing.combine_matrix()[0, 0].item())


def test_busiest_expert():
    assert busiest_expert(torch.tensor([1, 9, 4])) == 1
