"""The history that the explorer shows is a run's, and its numbers fit together."""

import pytest

from moe_edu.experiments.learning_history import (
    AUX_LOSS_COEFS,
    PHRASES,
    SETTINGS,
    SNAPSHOT_EVERY,
    WINDOW,
    model_fields,
    read_history,
    summarize,
)
from moe_edu.explorers.learning_curve import EXPLORER, view

HISTORY = read_history()


@pytest.mark.parametrize("weight", AUX_LOSS_COEFS)
class TestHistory:
    def test_covers_the_run(self, weight):
        run = HISTORY["runs"][f"{weight:g}"]
        steps = SETTINGS.steps
        assert [point["step"] for point in run["points"]] == list(range(WINDOW, steps + 1, WINDOW))
        assert [s["step"] for s in run["snapshots"]] == list(range(SNAPSHOT_EVERY, steps + 1, SNAPSHOT_EVERY))

    def test_was_made_with_the_settings_of_the_command(self, weight):
        saved = HISTORY["runs"][f"{weight:g}"]
        for name in ("steps", "seed", "batch_tokens", "learning_rate", "vocab_size"):
            assert saved["settings"][name] == getattr(SETTINGS, name), name
        assert saved["model_fields"] == model_fields(weight)

    def test_loads_are_shares(self, weight):
        for point in HISTORY["runs"][f"{weight:g}"]["points"]:
            assert len(point["load"]) == 8
            assert sum(point["load"]) == pytest.approx(1, abs=0.005)
            assert 0 <= point["left_behind"] <= 1

    def test_every_phrase_is_translated_each_time(self, weight):
        for snapshot in HISTORY["runs"][f"{weight:g}"]["snapshots"]:
            assert len(snapshot["translations"]) == len(PHRASES)
            assert 0 <= snapshot["chrf"] <= 100


def test_both_runs_begin_alike():
    """The same weights, batches and seed: only the balancing loss differs."""
    first, other = (run["points"][0]["loss"] for run in HISTORY["runs"].values())
    assert first == pytest.approx(other, rel=0.05)


def test_a_window_is_the_mean_of_its_lines():
    lines = [
        {"step": step, "loss": loss, "expert_load": {"encoder.1": [share, 1 - share]}, **{BEHIND: share / 10}}
        for step, loss, share in ((1, 2.0, 0.25), (2, 4.0, 0.75))
    ]
    assert summarize(lines) == {"step": 2, "loss": 3.0, "load": [0.5, 0.5], "left_behind": 0.05}


BEHIND = "experts/fraction_tokens_left_behind"


def test_shows_the_point_and_the_last_look():
    shown = view(EXPLORER.state(step=SNAPSHOT_EVERY + WINDOW))
    run = HISTORY["runs"]["0.01"]
    assert shown["loss"] == run["points"][SNAPSHOT_EVERY // WINDOW]["loss"]
    assert shown["chrf"] == run["snapshots"][0]["chrf"]


def test_before_the_first_look_nothing_is_translated():
    shown = view(EXPLORER.state(step=WINDOW))
    assert shown["chrf"] is None
    assert not any(shown["right"])
    assert "nothing has been translated yet" in shown["sentence"]


def test_what_the_lesson_says_of_the_run():
    """At a loss below 2 no phrase is right; along the way, January stands in for February."""
    points = HISTORY["runs"]["0.01"]["points"]
    first_below = next(point["step"] for point in points if point["loss"] < 2)
    assert not any(view(EXPLORER.state(step=first_below))["right"])
    date = [phrase["human"] for phrase in HISTORY["phrases"]].index("February 7, 1940")
    said = [snapshot["translations"][date] for snapshot in HISTORY["runs"]["0.01"]["snapshots"]]
    assert "January 7, 1940" in said
    assert said[0].isdigit()


def test_right_is_what_the_human_wrote():
    for place, snapshot in enumerate(HISTORY["runs"]["0.01"]["snapshots"], start=1):
        shown = view(EXPLORER.state(step=place * SNAPSHOT_EVERY))
        humans = [phrase["human"] for phrase in HISTORY["phrases"]]
        expected = [a == b for a, b in zip(snapshot["translations"], humans, strict=True)]
        assert shown["right"] == expected
