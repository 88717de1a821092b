"""The benchmark of the explorers measures each of them; how fast is not a test's business."""

import json
import subprocess
import sys

import pytest

from moe_edu.explorers import NAMES

pytestmark = pytest.mark.browser


def test_times_every_explorer(tmp_path):
    output = tmp_path / "times.json"
    # In a process of its own: Playwright's browser of the other tests is at work in this one.
    command = [
        sys.executable,
        "-m",
        "moe_edu.cli",
        "bench",
        "explorers",
        "--presses",
        "8",
        "--output",
        output,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text("utf-8"))
    assert [result["name"] for result in results] == list(NAMES)
    assert all(result["presses"] >= 4 for result in results)
    assert all(0 < result["median_ms"] <= result["slowest_ms"] for result in results)
