"""The router board's numbers are the router's."""

import math

import torch

from moe_edu.explorers.router_board import EXPLORER, view


def test_gates_are_the_shares_of_the_two_best():
    shown = view(EXPLORER.state())
    e = [math.exp(logit) for logit in (2.0, 0.5, 0.0, 0.2)]  # "the"
    assert shown["chosen"][0] == [0, 1]
    assert math.isclose(shown["probs"][0][0], e[0] / sum(e))
    assert math.isclose(shown["gates"][0][0], e[0] / (e[0] + e[1]))
    assert sum(shown["load"]) == 12


def test_top_1_gives_all_to_the_first():
    shown = view(EXPLORER.state(choices="1"))
    assert shown["gates"] == [[1.0, 0.0]] * 6
    assert sum(shown["load"]) == 6


def test_temperature_sharpens_and_flattens():
    tops = [max(view(EXPLORER.state(temperature=t))["probs"][0]) for t in (0.5, 1.0, 4.0)]
    assert tops == sorted(tops, reverse=True)


def test_sampling_draws_other_runners_up_and_leaves_the_first_choice():
    boards = [view(EXPLORER.state(policy="sampling", draw=draw))["chosen"] for draw in range(1, 13)]
    assert len({str(board) for board in boards}) > 1
    assert len({str([first for first, _ in board]) for board in boards}) == 1


def test_random_drops_some_second_choices():
    alone = [
        torch.tensor(view(EXPLORER.state(policy="random", draw=d))["chosen"])[:, 1].lt(0).sum()
        for d in range(1, 13)
    ]
    assert min(alone) < max(alone)
