"""Progress: one JSON file on the learner's machine, which can be exported and imported.

It holds outcomes, numbers of tries and the source of right answers. That source is only ever shown, never run.
"""

from __future__ import annotations

import contextlib
import json
import os
from html import escape
from pathlib import Path
from typing import Any

from moe_edu.exercises.judge import Verdict
from moe_edu.exercises.registry import LESSONS, all_exercises, exercises_of, full_key

FILE_VARIABLE = "MOE_EDU_PROGRESS"  # environment variable: a different path for the file
_FORMAT = 1
_MAX_BYTES = 5_000_000


class ProgressError(ValueError):
    """A progress file that cannot be read."""


def progress_file() -> Path:
    """Where progress is kept: `.moe_edu/progress.json` in the home folder, unless MOE_EDU_PROGRESS says otherwise."""
    return Path(os.environ.get(FILE_VARIABLE) or Path.home() / ".moe_edu" / "progress.json")


def record(key: str, verdict: Verdict, source: str) -> None:
    """Record a verdict; an exercise once right stays right. Without write access, nothing is recorded."""
    if verdict.outcome == "not attempted":
        return
    # A damaged file is left as it is, for its owner to repair.
    with contextlib.suppress(OSError, ProgressError):
        entries = load_progress()
        entry = entries.setdefault(key, {"right": False, "tries": 0, "source": ""})
        entry["tries"] += 1
        if verdict.outcome == "right":
            entry |= {"right": True, "source": source}
        _write(progress_file(), entries)


def load_progress(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """By key: `{"right": bool, "tries": int, "source": str}`; empty if there is no file yet.

    Raises:
        ProgressError: not a progress file, or damaged; names the file and the fix.
    """
    path = path or progress_file()
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES:,} bytes")
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version reads {_FORMAT}")
        return {str(key): _entry(entry) for key, entry in content["exercises"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ProgressError(
            f"{path} is not a readable progress file ({error}): move it elsewhere or delete it"
        ) from error


def export_progress(path: str | Path) -> None:
    """Write your progress to `path`, to keep it or to move it to another machine."""
    entries = load_progress()
    _write(Path(path), entries)
    print(f"{len(entries)} exercises written to {path}")


def import_progress(path: str | Path) -> None:
    """Add an export to your progress; what is right here stays right.

    Raises:
        FileNotFoundError: no such file.
        ProgressError: not an export.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")
    entries = load_progress()
    for key, theirs in load_progress(Path(path)).items():
        ours = entries.get(key)
        if ours is None or (theirs["right"] and not ours["right"]):
            entries[key] = theirs
    _write(progress_file(), entries)
    print(f"Exercises solved: {sum(entry['right'] for entry in entries.values())}")


def my_code(key: str) -> None:
    """Print the source of your right answer, to copy into a cell and run.

    Raises:
        ValueError: this machine has no right answer to `key`.
    """
    key = full_key(key)
    entry = load_progress().get(key)
    if entry is None or not entry["right"]:
        raise ValueError(
            f"no right answer to {key} in {progress_file()}: solve the exercise, or import your progress"
        )
    print(entry["source"])


def progress_table() -> str:
    """HTML: the exercises of each lesson, with a mark at those that are right."""
    entries = load_progress()
    total = len(all_exercises())
    right = {key for key, entry in entries.items() if entry["right"]}
    rows = "".join(
        f'<tr><td>{lesson}</td><td class="moe-whole">{_dots(exercises, right)}</td></tr>'
        for lesson in LESSONS
        if (exercises := [exercise.key for exercise in exercises_of(lesson)])
    )
    done = sum(exercise.key in right for exercise in all_exercises())
    head = "<thead><tr><th>lesson</th><th>exercises</th></tr></thead>"
    return (
        f'<div class="moe"><p>{done} of {total} exercises are right.</p>'
        f'<table class="moe-table">{head}<tbody>{rows}</tbody></table></div>'
    )


def _dots(keys: list[str], right: set[str]) -> str:
    marks = " ".join(f"{'✓' if key in right else '○'}&nbsp;{escape(key)}" for key in keys)  # kept on one line
    return f"<span>{marks}</span>"


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    values = {"right": entry["right"], "tries": entry["tries"], "source": entry["source"]}
    for value, kind in zip(values.values(), (bool, int, str), strict=True):
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return values


def _write(path: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Write atomically: the kernel may be killed at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"format": _FORMAT, "exercises": dict(sorted(entries.items()))}, indent=1, ensure_ascii=False
    )
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")  # another kernel may be writing too
    scratch.write_text(text + "\n", encoding="utf-8")
    scratch.replace(path)
