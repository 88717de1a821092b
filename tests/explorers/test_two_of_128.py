"""The explorer's layer is the published one's: first choices run expert 1, all other slots expert 0."""

import pytest

from moe_edu.explorers.two_of_128 import EXPLORER, view


@pytest.mark.parametrize("experts", [2, 3, 8, 16])
def test_as_published_only_experts_0_and_1_run(experts):
    shown = view(EXPLORER.state(experts=experts))
    assert shown["rows"] == [6 * (experts - 1), 6] + [0] * (experts - 2)
    for weights, (first, second) in zip(shown["weights"], shown["gates"], strict=True):
        assert weights[:2] == pytest.approx([second, first])
        assert not any(weights[2:])


@pytest.mark.parametrize("experts", [2, 8, 16])
def test_fixed_it_computes_two_rows_per_word_and_passes_every_test(experts):
    shown = view(EXPLORER.state(code="fixed", experts=experts))
    assert sum(shown["rows"]) == 12
    assert all(shown["tests"])
    assert max(shown["errors"]) == 0


def test_the_first_four_tests_never_see_the_bug():
    for changes in ({}, *EXPLORER.solutions, {"experts": 16, "push": -2.0}):
        assert view(EXPLORER.state(**changes))["tests"][:4] == [True] * 4


def test_neither_of_the_other_two_is_enough():
    only_coverage, only_loop = (
        view(EXPLORER.state(**changes))["tests"][4:] for changes in EXPLORER.solutions[1:]
    )
    assert only_coverage == [True, False]
    assert only_loop == [False, True]


def test_no_push_makes_a_tie():
    for push in range(-6, 7):
        for row in EXPLORER.data["logits"]:
            logits = [logit + push / 2 * (e == 1) for e, logit in enumerate(row)]
            assert len({round(logit, 6) for logit in logits}) == len(logits)
