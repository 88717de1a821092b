"""What `moe-edu env` prints, and that the bug report form asks for it."""

import platform
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

import moe_edu
from moe_edu import cli, environment
from moe_edu.kernels import compiled

ROOT = Path(__file__).parents[1]


def facts():
    """The printed facts by name."""
    done = CliRunner().invoke(cli.main, ["env"])
    assert done.exit_code == 0, done.output
    pairs = [line.partition(":")[::2] for line in done.output.splitlines()]
    return {name: fact.strip() for name, fact in pairs}


def test_names_versions_machine_device_and_back_end():
    printed = facts()
    assert printed["moe_edu"] == moe_edu.__version__
    assert printed["Python"] == platform.python_version()
    assert printed["PyTorch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in printed["processor"]
    assert printed["memory"].endswith("GB") or platform.system() == "Windows"
    assert printed["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    layer = moe_edu.SparseMLP(moe_edu.MoEConfig(d_model=64, encoder_ffn_dim=64, num_experts=8))
    expected = moe_edu.explain_backend(layer.experts.to(printed["device"].split()[0]))
    assert printed["back end, float32"] == f"{expected.backend}: {expected.reason}"


def test_names_the_extras_that_are_not_complete(monkeypatch):
    missing = {"lab": ["jupyterlab", "papermill"]}
    monkeypatch.setattr(environment, "find_missing", lambda extra: missing.get(extra, []))
    printed = facts()
    assert printed["extra lab"] == "without jupyterlab, papermill"
    assert printed["extra lessons"] == "complete"


def test_vectors_are_as_wide_as_the_processors(compiled_code):
    assert facts()["compiled code"] == f"{compiled.vector_bits()} bits at once"
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.is_file():
        pytest.skip("only x86-64 has vectors of several widths, and only Linux lists them")
    assert compiled.vector_bits() == (512 if " avx512f " in cpuinfo.read_text("utf-8") else 256)


def test_says_why_there_is_no_compiled_code(monkeypatch):
    monkeypatch.setattr(compiled, "_WHY_NOT", "no C compiler was there")
    assert compiled.vector_bits() == 0
    assert facts()["compiled code"] == "no C compiler was there"


def test_the_bug_report_form_asks_for_it():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text("utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    (field,) = (one for one in form["body"] if "moe-edu env" in one["attributes"]["label"])
    assert field["validations"]["required"]
