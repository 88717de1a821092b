"""Run notebooks from top to bottom and save them as they ship: `python -m moe_edu.lessons.execute notebooks/*.ipynb`.

The lesson's exercises are put in first, from `moe_edu/exercises/`. Widget state and widget views are left out of the
saved notebook: without a kernel they would only say "model not found", whereas their text tells what to do. Prints
the time and the peak memory of each; `--check` only measures, and saves nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import click
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from moe_edu.exercises.cells import with_exercises
from moe_edu.lessons.notebook import WIDGET_VIEW


class Cost(NamedTuple):
    """What a run needed: seconds from the first cell to the last, and the kernel's peak memory in MB (10^6 bytes)."""

    seconds: float
    peak_mb: float | None


def execute(notebook: NotebookNode, folder: Path) -> Cost:
    """Run every cell in `folder`; the notebook is changed in place.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    client = NotebookClient(
        notebook,
        timeout=None,
        store_widget_state=False,
        record_timing=False,
        coalesce_streams=True,  # however the kernel cut its output
        resources={"metadata": {"path": str(folder)}},
    )
    with client.setup_kernel():
        start = time.perf_counter()
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        seconds = time.perf_counter() - start
        notebook.cells.append(
            new_code_cell("from moe_edu.system.machine import peak_memory_mb\nprint(peak_memory_mb())")
        )
        client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1)
    probe = notebook.cells.pop()
    drop_widgets(notebook)
    peak = probe.outputs[0].text.strip()
    return Cost(seconds, None if peak == "None" else float(peak))


def drop_widgets(notebook: NotebookNode) -> NotebookNode:
    """Leave out what only a live kernel can show; in place."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(WIDGET_VIEW, None)
    return notebook


@click.command(help=__doc__)
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--check", is_flag=True, help="Measure only; save nothing.")
def main(paths: tuple[Path, ...], check: bool) -> None:
    for path in paths:
        notebook = with_exercises(nbformat.read(path, as_version=4), lesson=path.name[:2])
        seconds, peak = execute(notebook, path.parent)
        if not check:
            nbformat.write(notebook, path)
        memory = "unknown" if peak is None else f"{peak:.0f} MB"
        print(
            f"{path.name}: {seconds:.0f} s, peak memory {memory}, {path.stat().st_size / 1000:.0f} kB",
            flush=True,
        )


if __name__ == "__main__":
    main()
