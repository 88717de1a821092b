"""Shared by tests of the installed package: a copy of the checkout, its sdist and wheel, environments of links."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Callable, Iterable
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

from moe_edu.system.requirements import requirements_of

ROOT = Path(__file__).parents[2]


class Environment(NamedTuple):
    """A separate Python environment: its Python, and the folder with links to packages of this one."""

    python: Path
    links: Path

    def run(self, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run its Python, isolated from this environment."""
        ours = ("PYTHON", "VIRTUAL_ENV", "MOE_EDU", "JUPYTER", "COLAB", "KAGGLE")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        command = [self.python, *arguments]
        return subprocess.run(command, cwd=cwd, env=kept | variables, capture_output=True, text=True)


def needed_for(requirements: Iterable[str]) -> set[str]:
    """The names of all packages that `requirements` need, directly or not, as they are installed here."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_needed and name not in found:
            found.add(name)
            waiting += [Requirement(text) for text in distribution(name).requires or ()]
    return found


@pytest.fixture(scope="session")
def make_environment() -> Callable[[Path, Iterable[str]], Environment]:
    """Make an environment with links to the packages of this one that some requirements need, and no others.

    It takes a second, where pip would copy a gigabyte. The links are not where pip installs packages, so pip never
    writes through them.
    """
    if sys.platform == "win32":
        pytest.skip("Windows makes links for administrators only")

    def make(folder: Path, requirements: Iterable[str]) -> Environment:
        venv.create(folder, symlinks=True)
        places = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})
        links = folder / "links"
        links.mkdir()
        (Path(places["purelib"]) / "links.pth").write_text(f"{links}\n", "utf-8")
        for name in needed_for(requirements):
            package = distribution(name)
            parts = {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}
            assert parts, f"{name} does not say which files are its own"
            for part in parts:
                if not (links / part).exists():
                    (links / part).symlink_to(Path(str(package.locate_file(part))).resolve())
        return Environment(Path(places["scripts"]) / "python", links)

    return make


@pytest.fixture(scope="session")
def copy_checkout() -> Callable[[Path], None]:
    """Copy the files here that git does not ignore, committed or not, to a folder."""

    def copy(folder: Path) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
        )
        if listed.returncode:
            pytest.skip("not a git checkout")
        for file in filter(None, listed.stdout.split("\0")):
            if (ROOT / file).is_file():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes((ROOT / file).read_bytes())

    return copy


class Distributions(NamedTuple):
    """The two files of a release."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="session")
def distributions(tmp_path_factory, copy_checkout) -> Distributions:
    """An sdist of this checkout, and a wheel built from that sdist, without a network."""
    folder = tmp_path_factory.mktemp("distributions")
    copy_checkout(folder / "source")
    sdist = _build("sdist", folder / "source", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Distributions(sdist, _build("wheel", unpacked, folder))


def _build(kind: str, source: Path, output: Path) -> Path:
    """Call the build back end as pip does, with the setuptools that is installed here."""
    call = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(output)!r}))"
    done = subprocess.run([sys.executable, "-c", call], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def core(tmp_path_factory, make_environment, distributions) -> Environment:
    """The wheel with its core dependencies only: no Jupyter, no widgets, no Plotly, no transformers."""
    folder = tmp_path_factory.mktemp("core") / "env"
    environment = make_environment(folder, requirements_of())
    command = [sys.executable, "-m", "pip", "--python", environment.python, "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-index", distributions.wheel], check=True)
    return environment
