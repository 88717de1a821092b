"""Binder's image of this folder: repo2docker reads the folder and writes its Dockerfile, without Docker."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan():
    """The output of `repo2docker --no-build --debug`: the files it found, and the Dockerfile."""
    if sys.platform == "win32":
        pytest.skip("repo2docker does not run on Windows")
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_installs_binders_environment(plan):
    assert '--file "binder/environment.yml"' in plan
    assert "COPY --chown=0:0 src/binder/environment.yml" in plan


def test_makes_one_environment_with_the_requested_python(plan):
    """It cannot read a range: it would make one with its default Python, then replace all of it in a second layer."""
    asked = re.search(r"python =(3\.\d+)", (ROOT / "binder" / "environment.yml").read_text("utf-8"))[1]
    assert "Python version unspecified" not in plan
    assert f"Building conda environment for python={asked}\n" in plan


def test_runs_the_script_that_installs_the_package(plan):
    assert "RUN ./binder/postBuild" in plan
    script = (ROOT / "binder" / "postBuild").read_text("utf-8")
    assert script.startswith("#!/usr/bin/env bash\n")
    assert subprocess.run(["bash", "-n", ROOT / "binder" / "postBuild"]).returncode == 0
    # Without dependencies, so that pip replaces no conda package; without a cache, which would stay in the image.
    assert "pip install --no-deps --no-cache-dir -e ." in script


def test_reads_nothing_else(plan):
    """Each of apt.txt, requirements.txt, start and the like would make the image larger or its start slower."""
    assert sorted(path.name for path in (ROOT / "binder").iterdir()) == ["environment.yml", "postBuild"]
    assert "requirements.txt" not in plan
    assert "R2D_ENTRYPOINT" not in plan


def test_is_for_the_cpu_and_without_mkl():
    entries = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text("utf-8"))["dependencies"]
    assert any(entry.startswith("pytorch-cpu") for entry in entries)
    assert "libblas=*=*openblas" in entries
    assert not [entry for entry in entries if re.search("cuda|gpu|mkl|nvidia", entry)]
