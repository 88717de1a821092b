"""Every notebook in Notebook 7: it runs to its end, and its explorers are alive and move by keyboard."""

from pathlib import Path

import pytest

NAMES = sorted(path.name for path in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("name", NAMES, ids=lambda name: Path(name).stem)
def test_runs_to_its_end_and_moves(notebook_7, name):
    with notebook_7.run(name) as notebook:
        assert notebook.failures() == []
        for explorer in notebook.explorers():
            assert notebook.answers_to_a_key(explorer)
        assert notebook.complaints == []
        assert notebook.elsewhere == []
