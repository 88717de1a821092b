"""The first explorer's gates are a softmax over two scores."""

import math

from moe_edu.explorers.first_steps import EXPLORER, view


def test_gates_are_the_softmax_of_the_scores():
    shown = view(EXPLORER.state(scores=((1.0, -0.5),)))
    assert math.isclose(shown["gates"][0], 1 / (1 + math.exp(-1.5)))
    assert math.isclose(sum(shown["gates"]), 1)
    assert shown["chosen"] == [0, 1]


def test_only_the_difference_of_the_scores_counts():
    low, high = (view(EXPLORER.state(scores=(pair,)))["gates"] for pair in ((-2.0, -3.0), (4.0, 3.0)))
    assert math.isclose(low[0], high[0])


def test_equal_scores_share_equally():
    shown = view(EXPLORER.state(word="chat", scores=((2.0, 2.0),)))
    assert shown["gates"] == [0.5, 0.5]
    assert shown["sentence"] == "Expert 0 and expert 1 count the same for “\u2068chat\u2069”: 0.50 each."


def test_no_word_is_no_problem():
    assert "“\u2068…\u2069”" in view(EXPLORER.state(word=""))["sentence"]
