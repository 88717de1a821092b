"""The sdist and the wheel of a release, built and inspected."""

import importlib.util
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from moe_edu.system.notebooks import FIRST_LESSON

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]


@pytest.fixture
def in_wheel(distributions):
    """The names of the files in the wheel."""
    with zipfile.ZipFile(distributions.wheel) as archive:
        return set(archive.namelist())


def below(folder, *patterns):
    """The files in `folder` of this checkout, relative to the checkout."""
    return {
        path.relative_to(ROOT).as_posix() for pattern in patterns for path in (ROOT / folder).rglob(pattern)
    }


def test_every_package_is_listed():
    rooms = {path.parent.relative_to(ROOT) for path in (ROOT / "moe_edu").rglob("__init__.py")}
    assert set(SETUPTOOLS["packages"]) == {".".join(room.parts) for room in rooms} | {"moe_edu.notebooks"}


def test_the_wheel_has_all_that_runs(in_wheel):
    data = below("moe_edu", "*.py", "*.js", "*.svg", "*.json", "*.xz", "*.safetensors", "*.tsv", "py.typed")
    assert not data - in_wheel
    lessons = below("notebooks", "[0-9g]*.ipynb", "*.svg", "*.png")
    assert len(lessons) > 12
    assert not {f"moe_edu/{path}" for path in lessons} - in_wheel
    assert not [name for name in in_wheel if re.match("tests|docs|notebooks|build", name)]


def test_the_wheel_has_the_compiled_code(distributions, in_wheel):
    """It is loaded, not imported, so it depends on the system but not on the version of Python."""
    if importlib.util.find_spec("moe_edu.kernels._compiled") is None:
        pytest.skip("there is no C compiler that knows OpenMP")
    assert [name for name in in_wheel if re.match(r"moe_edu/kernels/_compiled.*\.(so|pyd)$", name)]
    assert not distributions.wheel.stem.endswith("any")


def test_the_sdist_has_what_a_wheel_is_built_from(distributions):
    with tarfile.open(distributions.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "LICENSE", "pyproject.toml", f"notebooks/{FIRST_LESSON}"}
    assert not (wanted | below("moe_edu/kernels/csrc", "*.[ch]")) - names


def test_the_lessons_come_with_the_wheel(core, tmp_path):
    """Outside a clone, one command copies them; run again, it replaces nothing."""
    first = core.run("-m", "moe_edu", "lessons", "mine", cwd=tmp_path)
    copied = sorted(path.name for path in (tmp_path / "mine").glob("*.ipynb"))
    assert copied == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert re.match(r"\d\d files copied to mine$", first.stdout)
    (tmp_path / "mine" / FIRST_LESSON).write_text("my answers")
    again = core.run("-m", "moe_edu", "lessons", "mine", cwd=tmp_path)
    assert re.match(r"0 files copied to mine; \d\d were already there and are unchanged$", again.stdout)
    assert (tmp_path / "mine" / FIRST_LESSON).read_text() == "my answers"


def test_the_wheel_runs_from_its_own_folder(core, tmp_path):
    script = "import moe_edu; from moe_edu.kernels.compiled import _LIBRARY; print(moe_edu.__file__, bool(_LIBRARY))"
    file, is_compiled = core.run("-c", script, cwd=tmp_path).stdout.split()
    assert core.python.parents[1] in Path(file).parents
    assert is_compiled == str(importlib.util.find_spec("moe_edu.kernels._compiled") is not None)
