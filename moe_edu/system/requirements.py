"""What the lessons need and this Python lacks, in one line that says how to mend it.

On Colab and Kaggle the package is installed without its dependencies, so that theirs stay: nobody else checks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

PACKAGE = "moe-edu"


class Lack(NamedTuple):
    """A package that is not there (`found` is None) or older than `needed`."""

    name: str
    needed: str
    found: str | None


class MissingRequirementError(ImportError):
    """Packages are missing; notebooks show its message alone, without the way through our imports."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def requirements_of(package: str = PACKAGE) -> list[str]:
    """Its requirements but for extras, like "torch>=2.10"; none where the package runs without being installed."""
    try:
        return [text for text in requires(package) or () if "extra ==" not in text]
    except PackageNotFoundError:
        return []


def find_lacks(requirements: Iterable[str], installed: Callable[[str], str] = version) -> list[Lack]:
    """The requirements that are not met.

    Args:
        requirements: like "torch>=2.10".
        installed: gives a package's version, or raises PackageNotFoundError.
    """
    lacks = []
    for requirement in requirements:
        name, needed = requirement.split(">=")
        try:
            found = installed(name)
        except PackageNotFoundError:
            lacks.append(Lack(name, needed, None))
            continue
        if _release(found) < _release(needed):
            lacks.append(Lack(name, needed, found))
    return lacks


def describe_missing(names: Iterable[str]) -> str:
    """One line on packages that are not there."""
    packages = " ".join(names)
    return f"not installed: {packages}. Run %pip install {packages} in a cell, then run this cell again."


def require_all() -> None:
    """Say at once what no import would find.

    Raises:
        MissingRequirementError: names every missing package, and the command that installs them.
    """
    missing = [lack.name for lack in find_lacks(requirements_of()) if lack.found is None]
    if missing:
        raise MissingRequirementError(describe_missing(missing))


def _release(version: str) -> tuple[int, ...]:
    """The numbers of "2.10.0+cu128": (2, 10, 0)."""
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", version)[0].split("."))  # type: ignore[index]
