"""Lesson 10 names tests that exist, and shows the saved results of a release that is not installed."""

import importlib.metadata
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from moe_edu.exercises.cells import PREFIX
from moe_edu.lessons import published

TESTS = Path(__file__).parents[1]
NOTEBOOK = TESTS.parent / "notebooks" / "10_read_the_reference.ipynb"

WITHOUT_TRANSFORMERS = """
import importlib.metadata, sys
def version(name, find=importlib.metadata.version):
    if name == "transformers":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)
importlib.metadata.version = version
sys.modules["transformers"] = None
"""


def code_cells():
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_names_tests_that_exist():
    (table,) = (cell.source for cell in code_cells() if cell.id == "properties-table")
    tests = "".join(path.read_text("utf-8") for path in TESTS.rglob("test_*.py"))
    names = re.findall(r'"(Test\w+|test_\w+)"', table)
    assert len(names) >= 10
    for name in names:
        assert re.search(rf"(class|def) {name}\b", tests), name


def test_rows_of_release_5_are_those_that_were_seen():
    """Release 5.23.0 itself, on 20 words and 128 experts, ran expert 0 on 2540 rows and expert 1 on 20."""
    (rows,) = (printed(cell) for cell in code_cells() if cell.id == "rows")
    assert "{0: 2540, 1: 20}" in rows


def test_shows_the_same_without_transformers():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not cell.id.startswith(PREFIX) and cell.id != "live"]
    expected = {cell.id: printed(cell) for cell in notebook.cells if cell.cell_type == "code"}
    notebook.cells.insert(0, new_code_cell(WITHOUT_TRANSFORMERS, id="without"))
    NotebookClient(
        notebook,
        timeout=600,
        store_widget_state=False,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    ).execute()
    seen = {cell.id: printed(cell) for cell in notebook.cells if cell.cell_type == "code"}
    seen.pop("without")
    assert seen == expected


class TestObserved:
    def test_looks_where_the_release_is_installed(self):
        assert published.is_installed()
        assert published.observed(saved=3)(lambda: 3)() == 3

    def test_a_saved_value_that_the_release_does_not_give_is_refused(self):
        with pytest.raises(AssertionError, match="gives 4, but 3 was saved"):
            published.observed(saved=3)(lambda: 4)()

    @pytest.mark.parametrize("found", [None, "5.23.0"])
    def test_elsewhere_gives_what_was_saved(self, monkeypatch, found):
        def version(name):
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(published, "version", version)
        assert published.observed(saved=3)(lambda: 4)() == 3
