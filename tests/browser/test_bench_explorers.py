"""The benchmark of the explorers measures each of them, both ways; the tests do not check how fast they are."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from moe_edu import cli
from moe_edu.bench.explorers import BOX
from moe_edu.explorers import NAMES

pytestmark = pytest.mark.browser


def bench(*options):
    # In a separate process: the other tests' Playwright browser is running in this one.
    command = [sys.executable, "-m", "moe_edu.cli", "bench", "explorers", *options]
    return subprocess.run(command, capture_output=True, text=True)


def measured(tmp_path, *options):
    output = tmp_path / "times.json"
    done = bench("--json", str(output), *options)
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text("utf-8"))
    results = document["results"]
    assert all(0 < result["median_ms"] <= result["slowest_ms"] for result in results)
    machine, _, *table = done.stdout.splitlines()
    assert machine.startswith(document["machine"]["processor"])
    rows = [line.split() for line in table]
    assert [row[:2] for row in rows] == [[result["name"], result["way"]] for result in results]
    return results


def test_times_every_explorer_in_the_page(tmp_path):
    results = measured(tmp_path, "--no-python", "--presses", "8")
    assert [(result["name"], result["way"]) for result in results] == [(name, "page") for name in NAMES]
    assert all(result["presses"] >= 4 for result in results)


def test_times_the_way_through_python(tmp_path):
    """One explorer stands for all, which are linked in the same way; the translation box is measured, too."""
    results = measured(tmp_path, "--only", "router_training", "--only", BOX, "--presses", "4")
    ways = [(result["name"], result["way"]) for result in results]
    assert ways == [("router_training", "page"), ("router_training", "python"), (BOX, "python")]
    assert all(result["presses"] >= 2 for result in results)


def test_unknown_names_are_refused():
    done = CliRunner().invoke(cli.main, ["bench", "explorers", "--only", "router_bored"])
    assert done.exit_code == 2
    assert "router_bored: choose from first_steps, " in done.stderr
