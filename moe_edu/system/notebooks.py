"""Where the lessons are: in a clone of the project, or in the installed package, from which readers get a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

FIRST_LESSON = "00_start_here.ipynb"
COPY = "moe_edu_lessons"  # the default folder of a reader's own copy
_PACKAGE = Path(__file__).parents[1]


def find_clone() -> Path | None:
    """The lessons folder of the clone that this package runs from, or of one in the current folder; else None."""
    for root in (_PACKAGE.parent, Path.cwd()):
        if (root / "notebooks" / FIRST_LESSON).is_file():
            return root / "notebooks"
    return None


def copy_lessons(target: Path) -> tuple[int, int]:
    """Copy the lessons and their pictures to `target`; existing files are not replaced.

    Returns:
        How many files were copied, and how many were there already.

    Raises:
        FileNotFoundError: there are no lessons to copy, neither in a clone nor in the installed package.
        OSError: `target` cannot be written.
    """
    source = next((path for path in (_PACKAGE / "notebooks", find_clone()) if path and path.is_dir()), None)
    if source is None:
        raise FileNotFoundError("this copy of moe_edu came without its lessons: run `pip install moe-edu`")
    files = [path for pattern in ("*.ipynb", "images/*") for path in sorted(source.glob(pattern))]
    copied = 0
    for path in files:
        copy = target / path.relative_to(source)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            copied += 1
    return copied, len(files) - copied
