"""Run notebooks from top to bottom and save them as they ship: `python -m moe_edu.lessons.execute notebooks/*.ipynb`.

The lesson's exercises are put in first, from `moe_edu/exercises/`. What would only be dead weight in a saved notebook
is left out: widget state, and widget views, which without a kernel say "model not found" where their text says what
to do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from moe_edu.exercises.cells import with_exercises

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run every cell in `folder`; the notebook is changed in place and returned.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    client = NotebookClient(
        notebook,
        timeout=None,
        store_widget_state=False,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return drop_widgets(notebook)


def drop_widgets(notebook: NotebookNode) -> NotebookNode:
    """Leave out what only a live kernel can show; in place."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(WIDGET_VIEW, None)
    return notebook


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        notebook = with_exercises(nbformat.read(path, as_version=4), lesson=path.name[:2])
        execute(notebook, path.parent)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
