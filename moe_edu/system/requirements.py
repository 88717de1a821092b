"""Packages that moe_edu needs and this Python lacks, in one line that says how to fix it.

On Colab and Kaggle, moe_edu is installed without its dependencies, so that the ones there stay: only this file checks
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import NamedTuple

PACKAGE = "moe-edu"


class Lack(NamedTuple):
    """A package that is missing (`found` is None) or older than `needed`."""

    name: str
    needed: str
    found: str | None


class MissingRequirementError(ImportError):
    """Packages are missing; notebooks show only its message, without a traceback through our imports."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def requirements_of(extra: str = "", package: str = PACKAGE) -> list[str]:
    """The requirements of `package`, like "torch>=2.10"; none if it is not installed.

    Args:
        extra: one of its extras, for what that extra adds, including the extras that it contains; "" for what is
            always needed.
        package: name of the package.
    """
    try:
        declared = requires(package) or ()
    except PackageNotFoundError:
        return []
    found = []
    for text in declared:
        requirement, _, condition = (part.strip() for part in text.partition(";"))
        if extra != "".join(re.findall(r"""extra == ["']([\w-]+)["']""", condition)):
            continue
        inner = re.fullmatch(rf"{re.escape(package)}\[([\w-]+)\]", requirement)
        found += requirements_of(inner[1], package) if inner else [requirement]
    return found


def find_lacks(requirements: Iterable[str], installed: Callable[[str], str] = version) -> list[Lack]:
    """The requirements that are not met.

    Args:
        requirements: like "torch>=2.10"; "transformers==4.57.6" also accepts anything newer.
        installed: returns a package's version, or raises PackageNotFoundError.
    """
    lacks = []
    for requirement in requirements:
        name, needed = re.split("[>=]=", requirement)
        try:
            found = installed(name)
        except PackageNotFoundError:
            lacks.append(Lack(name, needed, None))
            continue
        if _release(found) < _release(needed):
            lacks.append(Lack(name, needed, found))
    return lacks


def find_missing(extra: str = "") -> list[str]:
    """Names of the missing packages among those that `extra` adds, or among those always needed."""
    return [lack.name for lack in find_lacks(requirements_of(extra)) if lack.found is None]


def explain_missing(*others: str) -> str | None:
    """For the command line: which of the lessons' packages and of `others` are missing, and how to install them.

    Returns:
        None if nothing is missing.
    """
    missing = find_missing("lessons") + [name for name in others if find_spec(name) is None]
    return f'not installed: {", ".join(missing)}. Run `pip install "{PACKAGE}[lab]"`' if missing else None


def describe_missing(names: Iterable[str]) -> str:
    """For notebooks: one line on missing packages."""
    packages = " ".join(names)
    return f"not installed: {packages}. Run %pip install {packages} in a cell, then run this cell again."


def require_all() -> None:
    """Report all missing packages at once, before the lessons' imports fail on them one by one.

    Raises:
        MissingRequirementError: packages are missing; the message names each, and the command that installs them.
    """
    missing = find_missing() + find_missing("lessons")
    if missing:
        raise MissingRequirementError(describe_missing(missing))


def _release(version: str) -> tuple[int, ...]:
    """The numbers of "2.10.0+cu128": (2, 10, 0)."""
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", version)[0].split("."))  # type: ignore[index]
