"""The project's own files: one list of dependencies, pins in one place, and workflows that test all promises."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import moe_edu

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CORE, EXTRAS = PYPROJECT["dependencies"], PYPROJECT["optional-dependencies"]
LAB = [requirement for requirement in EXTRAS["lab"] if not requirement.startswith("moe-edu[")]
CONDA_NAMES = {"torch": "pytorch-cpu"}


def conda_list(path: str) -> list[str]:
    """The conda packages of an environment file, without spaces."""
    environment = yaml.safe_load((ROOT / path).read_text("utf-8"))
    return [entry.replace(" ", "") for entry in environment["dependencies"] if isinstance(entry, str)]


def as_conda(requirements: list[str]) -> set[str]:
    """Requirements of pyproject.toml under conda's names."""
    pairs = (re.fullmatch(r"([\w-]+)(.*)", requirement).groups() for requirement in requirements)
    return {CONDA_NAMES.get(name, name) + bound for name, bound in pairs}


def test_conda_installs_the_packages_list():
    wanted = as_conda(CORE + EXTRAS["lessons"] + LAB)
    assert set(conda_list("environment.yml")) == wanted | {"python>=3.11,<3.14", "pip"}


@pytest.mark.parametrize("path", ["environment.yml", "binder/environment.yml"])
def test_pip_accepts_the_lines_from_conda(path, tmp_path):
    """conda writes these lines into a requirements file, which accepts fewer options than pip's command line."""
    environment = yaml.safe_load((ROOT / path).read_text("utf-8"))
    lines = [
        line for entry in environment["dependencies"] if isinstance(entry, dict) for line in entry["pip"]
    ]
    file = tmp_path / "requirements.txt"
    file.write_text("\n".join(lines), "utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--no-build-isolation",
        "-r",
        str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Invalid requirement" not in done.stderr
    assert "no such option" not in done.stderr


def test_binder_installs_the_same_except_what_it_brings_itself():
    entries = conda_list("binder/environment.yml")
    assert set(entries[2:]) == as_conda(CORE + EXTRAS["lessons"]) | {"pip"}
    # An exact version of Python, and the small BLAS: tests/project/test_binder.py says why.
    assert re.fullmatch(r"python=3\.1[1-3]", entries[0])
    assert entries[1] == "libblas=*=*openblas"


def test_the_lab_has_all_that_the_lessons_import():
    assert EXTRAS["lab"][0] == "moe-edu[lessons]"


def test_torch_is_pinned_in_the_constraints_only():
    assert [d for d in CORE if d.startswith("torch")] == ["torch>=2.10"]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text("utf-8").splitlines()


def test_every_direct_dependency_is_pinned_in_the_constraints():
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    }
    for requirement in CORE + EXTRAS["lessons"] + LAB + EXTRAS["site"] + EXTRAS["test"]:
        assert re.match(r"[\w-]+", requirement)[0].lower() in pinned


def test_the_version_is_in_one_place():
    assert "version" not in PYPROJECT
    assert importlib.metadata.version("moe-edu") == moe_edu.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == moe_edu.__version__


class TestWorkflows:
    """GitHub tests everything that pyproject.toml promises."""

    @staticmethod
    def read(name):
        return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))

    def test_every_system_with_the_oldest_and_the_newest_python_and_pytorch(self):
        corners = self.read("tests.yml")["jobs"]["systems"]["strategy"]["matrix"]["include"]
        oldest = PYPROJECT["requires-python"].removeprefix(">=")
        (torch,) = (d for d in CORE if d.startswith("torch"))
        newest = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)[1]
        pairs = {(oldest, torch.removeprefix("torch>=") + ".0"), ("3.13", newest)}
        for system in ("ubuntu-latest", "macos-latest", "windows-latest"):
            tried = {(corner["python"], corner["torch"]) for corner in corners if corner["system"] == system}
            assert pairs <= tried
        assert {corner["python"] for corner in corners} == {oldest, "3.12", "3.13"}

    def test_everything_is_what_the_readme_says(self):
        workflow = self.read("tests.yml")
        runs = {step["if"]: step["run"] for step in workflow["jobs"]["everything"]["steps"] if "if" in step}
        at_night = "github.event_name == 'schedule'"
        assert runs == {at_night.replace("==", "!="): "make test", at_night: "make nightly"}
        assert "schedule" in workflow[True]  # YAML 1.1 reads the key `on` as a boolean

    def test_the_site_is_published_from_what_make_site_builds(self):
        job = self.read("site.yml")["jobs"]["publish"]
        assert "make site" in [step.get("run") for step in job["steps"]]
        assert {"path": "build/site"} in [step.get("with") for step in job["steps"]]

    def test_a_release_has_the_tag_of_its_version(self):
        (step,) = (one for one in self.read("release.yml")["jobs"]["sdist"]["steps"] if "name" in one)
        for tag, status in ((f"v{moe_edu.__version__}", 0), ("v9.9.9", 1), (moe_edu.__version__, 1)):
            environ = os.environ | {"GITHUB_REF_NAME": tag}
            assert subprocess.run(["bash", "-ec", step["run"]], cwd=ROOT, env=environ).returncode == status

    def test_a_release_has_wheels_for_every_python_and_system(self):
        jobs = self.read("release.yml")["jobs"]
        systems = jobs["wheels"]["strategy"]["matrix"]["system"]
        assert {name.partition("-")[0] for name in systems} == {"ubuntu", "macos", "windows"}
        corners = self.read("tests.yml")["jobs"]["systems"]["strategy"]["matrix"]["include"]
        pythons = sorted({corner["python"] for corner in corners})
        build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["cibuildwheel"]["build"]
        assert build.split() == [f"cp{version.replace('.', '')}-*" for version in pythons]

    def test_only_the_publishing_job_may_prove_its_identity(self):
        workflow = self.read("release.yml")
        assert workflow[True]["push"] == {"tags": ["v*"]}  # YAML reads `on` as true
        assert workflow["permissions"] == {"contents": "read"}
        allowed = [name for name, job in workflow["jobs"].items() if "id-token" in job.get("permissions", {})]
        assert allowed == ["publish"]
        assert workflow["jobs"]["publish"]["if"] == "github.ref_type == 'tag'"
        assert set(workflow["jobs"]["publish"]["needs"]) == {"sdist", "wheels"}

    def test_every_workflow_declares_its_permissions(self):
        for path in (ROOT / ".github" / "workflows").glob("*.yml"):
            assert self.read(path.name)["permissions"]["contents"] == "read"
