"""The project's own files: one list of dependencies, pins in one place, README links that lead somewhere."""

import re
import tomllib
from pathlib import Path

import pytest

from moe_edu.exercises.registry import all_exercises

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch-cpu"}


def conda_requirements(path: Path) -> set[str]:
    """The entries of a conda environment's list, but for Python and pip, without blanks."""
    entries = re.findall(r"^  - ([\w-]+) ?([<>=].*)?$", path.read_text("utf-8"), re.M)
    return {name + bound.strip() for name, bound in entries} - {
        "conda-forge",
        "nodefaults",
        "python>=3.11,<3.14",
        "pip",
    }


@pytest.mark.parametrize("path", ["environment.yml", "binder/environment.yml"])
def test_conda_and_binder_install_the_same_list(path):
    wanted = set()
    for requirement in PYPROJECT["dependencies"] + PYPROJECT["optional-dependencies"]["lab"]:
        name, bound = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
        wanted.add(CONDA_NAMES.get(name, name) + bound)
    assert conda_requirements(ROOT / path) == wanted


def test_torch_is_pinned_in_the_constraints_only():
    assert [d for d in PYPROJECT["dependencies"] if d.startswith("torch")] == ["torch>=2.10"]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text("utf-8").splitlines()


def test_every_direct_dependency_is_pinned_in_the_constraints():
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    }
    extras = PYPROJECT["optional-dependencies"]
    for requirement in PYPROJECT["dependencies"] + extras["lab"] + extras["site"] + extras["test"]:
        assert re.match(r"[\w-]+", requirement)[0].lower() in pinned


def test_readme_links_lead_to_files():
    text = (ROOT / "README.md").read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target


def test_readme_names_tests_that_exist():
    text = (ROOT / "README.md").read_text("utf-8")
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"`(?:test_\w+\.py::)?(Test\w+|test_\w+)`", text)
    assert len(names) >= 10
    for name in names:
        assert re.search(rf"(class|def) {name}\b", tests), name


def test_readme_counts_the_exercises():
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    real_bugs = sum(bool(exercise.origin) for exercise in all_exercises())
    assert f"**Exercises**, {len(all_exercises())} of them" in text
    assert f"{real_bugs} are real bugs of published code" in text


def test_readme_names_every_lesson():
    text = (ROOT / "README.md").read_text("utf-8")
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        assert f"(notebooks/{path.name})" in text
