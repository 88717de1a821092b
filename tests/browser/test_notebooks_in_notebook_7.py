"""Notebooks in Notebook 7: they run to their end, and their explorers respond to the keyboard."""

from pathlib import Path

import pytest

NAMES = sorted(path.name for path in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.browser


# The first lesson, one whose explorer trains, and the one with forms and live figures; at night all of them.
DAILY = ("00_", "05_", "07_")
LESSONS = [pytest.param(name, marks=() if name.startswith(DAILY) else pytest.mark.nightly) for name in NAMES]


@pytest.mark.parametrize("name", LESSONS, ids=lambda name: Path(name).stem)
def test_runs_to_its_end_and_moves(notebook_7, name):
    with notebook_7.run(name) as notebook:
        assert notebook.failures() == []
        for explorer in notebook.explorers():
            assert notebook.answers_to_a_key(explorer)
        assert notebook.complaints == []
        assert notebook.elsewhere == []
