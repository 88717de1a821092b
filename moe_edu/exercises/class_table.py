"""What a class has solved: one table of the progress files that its learners exported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moe_edu.exercises.progress import ProgressError, load_progress
from moe_edu.exercises.registry import LESSONS, all_exercises, exercises_of
from moe_edu.figures.html import table_html


def class_table(paths: Iterable[str | Path]) -> str:
    """HTML: for each file, by name, how many exercises of each lesson are right.

    The caption names the exercises that nobody has solved, in the lessons that the class has begun. A file that cannot
    be read has a row too, and the caption says why.

    Raises:
        FileNotFoundError: no files are given, or one of them does not exist.
    """
    files = sorted(map(Path, paths))
    if not files:
        raise FileNotFoundError("no progress files: pass the files that exercises.export_progress wrote")
    keys = [[exercise.key for exercise in exercises_of(lesson)] for lesson in LESSONS]
    rows: list[list[str | int]] = [["all exercises", *map(len, keys), len(all_exercises())]]
    solved: set[str] = set()
    notes = []
    stems = [path.stem for path in files]
    for path in files:
        # With one folder per learner, all files may have the same name.
        name = path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}"
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            right = {key for key, entry in load_progress(path).items() if entry["right"]}
        except ProgressError as error:
            rows.append([name, *["–"] * (len(keys) + 1)])
            notes.append(f"{error}.")
            continue
        counts = [len(right.intersection(lesson)) for lesson in keys]
        rows.append([name, *counts, sum(counts)])
        solved |= right
    begun = [lesson for lesson in keys if solved.intersection(lesson)]
    unsolved = [key for lesson in begun for key in lesson if key not in solved]
    notes.append(f"In the lessons begun so far, solved by nobody: {', '.join(unsolved) or 'none'}.")
    return table_html(["", *LESSONS, "all"], rows, " ".join(notes))
