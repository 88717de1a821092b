"""The exercise cells of a notebook, generated from the exercises so that both always agree."""

from __future__ import annotations

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from moe_edu.exercises.registry import exercises_of

SECTION = "## Exercises"
PREFIX = "exercise-"


def exercise_cells(lesson: str) -> list[NotebookNode]:
    """Two cells per exercise: its text, and its starter with the check."""
    cells = []
    for exercise in exercises_of(lesson):
        name = f"{PREFIX}{exercise.key.replace('.', '-')}"
        cells.append(new_markdown_cell(exercise.head(), id=f"{name}-task"))
        cells.append(new_code_cell(exercise.cell_source(), id=name))
    return cells


def with_exercises(notebook: NotebookNode, lesson: str) -> NotebookNode:
    """Insert the lesson's exercises after the cell that begins with "## Exercises", replacing older ones.

    Raises:
        ValueError: the lesson has exercises, but the notebook has no such cell.
    """
    cells = [cell for cell in notebook.cells if not cell.get("id", "").startswith(PREFIX)]
    made = exercise_cells(lesson)
    if made:
        places = [i for i, cell in enumerate(cells) if cell.source.startswith(SECTION)]
        if not places:
            raise ValueError(
                f'lesson {lesson} has exercises: give its notebook a cell that begins with "{SECTION}"'
            )
        cells[places[0] + 1 : places[0] + 1] = made
    notebook.cells = cells
    return notebook


def solved(notebook: NotebookNode, lesson: str) -> NotebookNode:
    """Replace the starters by the shown solutions, in place."""
    sources = {exercise.cell_source(): exercise for exercise in exercises_of(lesson)}
    for cell in notebook.cells:
        exercise = sources.get(cell.source)
        if exercise is not None:
            cell.source = cell.source.replace(exercise.starter_source(), exercise.solution_source(), 1)
    return notebook
