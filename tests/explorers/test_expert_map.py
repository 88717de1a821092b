"""The expert map shows the results that ship."""

import random

import pytest

from moe_edu.data import get_language
from moe_edu.experiments.specialisation import load_results
from moe_edu.explorers.expert_map import EXPLORER, scripts_of, view


def test_it_shows_the_tables_of_the_results():
    rng = random.Random(0)
    sides = {"letters": None, "translator": "encoder", "decoder": "decoder"}
    for _ in range(30):
        state = EXPLORER.random_state(rng)
        shown = view(state)
        results = load_results(state["model"])
        report = results["runs"][0]["trained" if state["trained"] else "untrained"]
        side = sides[state["model"]]
        report = report[side] if side else report
        row = results["languages"].index(shown["rows"][shown["row"]])
        counts = report["load"][row]
        assert shown["shares"][shown["row"]] == pytest.approx([n / sum(counts) for n in counts])
        assert shown["words"] == report["words"][row][shown["expert"]][:3]
        language = report["information"]["language"]
        assert shown["bits"] == pytest.approx(language["bits"] - language["chance"], abs=1e-4)


def test_every_row_sums_to_one_and_so_do_an_experts_scripts():
    shown = view(EXPLORER.state())
    assert all(sum(row) == pytest.approx(1) for row in shown["shares"])
    assert sum(part for _, part in shown["scripts"]) == pytest.approx(1)


def test_scripts_count_every_language_alike():
    shares = [[0.2, 0.8], [0.6, 0.4], [0.0, 1.0]]
    assert scripts_of(0, shares, ["Latin", "Greek", "Latin"]) == [
        ["Greek", pytest.approx(0.75)],
        ["Latin", pytest.approx(0.25)],
    ]


def test_a_state_beyond_a_smaller_model_shows_its_last_cell():
    shown = view(EXPLORER.state(model="decoder", row=16, expert=15))
    assert shown["row"] == len(shown["rows"]) - 1
    assert shown["expert"] == len(shown["shares"][0]) - 1


def test_it_shows_most_scripts():
    scripts = {get_language(code).script for code in view(EXPLORER.state())["rows"]}
    assert len(scripts) >= 8
