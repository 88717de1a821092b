"""Where the lessons are: in a clone of the project, or in the installed package, from which a reader gets a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

FIRST_LESSON = "00_start_here.ipynb"
COPY = "moe_edu_lessons"  # the folder of a reader's own copy, unless they name another
_PACKAGE = Path(__file__).parents[1]


def find_clone() -> Path | None:
    """The lessons of the clone that this package runs from, or of one in the current folder; None without a clone."""
    for root in (_PACKAGE.parent, Path.cwd()):
        if (root / "notebooks" / FIRST_LESSON).is_file():
            return root / "notebooks"
    return None


def copy_lessons(target: Path) -> tuple[int, int]:
    """Copy the lessons and their pictures to `target`, and replace no file that is there.

    Returns:
        How many files were copied, and how many were there already.

    Raises:
        FileNotFoundError: neither a clone nor an installed package, so that there are no lessons to copy.
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
