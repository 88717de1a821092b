"""The benchmark of the explorers measures each of them; how fast is not a test's business."""

import json

import pytest
from click.testing import CliRunner

from moe_edu.cli import main
from moe_edu.explorers import NAMES

pytestmark = pytest.mark.browser


def test_times_every_explorer(tmp_path):
    output = tmp_path / "times.json"
    done = CliRunner().invoke(main, ["bench", "explorers", "--presses", "8", "--output", str(output)])
    assert done.exit_code == 0, done.output
    results = json.loads(output.read_text("utf-8"))
    assert [result["name"] for result in results] == list(NAMES)
    assert all(result["presses"] >= 4 for result in results)
    assert all(0 < result["median_ms"] <= result["slowest_ms"] for result in results)
