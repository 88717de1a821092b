"""The installed wheel with its core dependencies only, in a folder that is not a clone.

Every command works there, or says in one line what to install.
"""

import re
from pathlib import Path

import pytest

from moe_edu.system.requirements import requirements_of

ROOT = Path(__file__).parents[2]
LAB = 'Run `pip install "moe-edu[lab]"`'


@pytest.fixture
def run(core, tmp_path):
    """Run `python -m moe_edu` with some arguments, in an empty folder."""

    def run(*arguments):
        return core.run("-m", "moe_edu", *arguments, cwd=tmp_path, OMP_NUM_THREADS="1")

    return run


def test_the_environment_has_only_core_dependencies(core, tmp_path):
    script = (
        "from importlib.metadata import distributions\nfor one in distributions(): print(one.name.lower())"
    )
    there = set(core.run("-c", script, cwd=tmp_path).stdout.split())
    assert {"moe-edu", "torch", "tokenizers"} <= there
    assert not there & {
        "plotly",
        "ipywidgets",
        "anywidget",
        "ipython",
        "nbformat",
        "jupyterlab",
        "transformers",
    }


def test_every_command_says_what_it_does(core, tmp_path):
    script = """
import click
from moe_edu.cli import main

def tell(command, path):
    print(path)
    main([*path.split()[1:], "--help"], standalone_mode=False)
    with click.Context(command) as context:
        for name in getattr(command, "list_commands", lambda _: ())(context):
            tell(command.get_command(context, name), f"{path} {name}")

tell(main, "moe-edu")
"""
    done = core.run("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("moe-edu")]
    assert {
        f"moe-edu {name}" for name in ("bench", "bench gpu", "env", "lab", "lessons", "train", "translate")
    } <= {*told}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("translate", "--to", "eng_Latn", "quinta-feira, 1 de agosto de 1996"), "Thursday, August 1, 1996"),
        (("env",), "extra lessons:       without plotly, ipywidgets, anywidget\n"),
        (("bench", "layer", "--quick"), "share of the roofline"),
        (
            ("bench", "gpu", "--quick", "--mode", "inference", "--dtype", "bfloat16"),
            "one graph in torch.compile",
        ),
    ],
    ids=lambda value: "_".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_works(run, arguments, said):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_trains(run, tmp_path):
    small = ("--steps", "1", "--vocab-size", "600", "--sources", "fra_Latn", "--test-sentences", "2")
    done = run("train", "--out", "run", "--processes", "1", *small)
    assert done.returncode == 0, done.stderr
    assert {"model.safetensors", "result.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lab",), f"not installed: plotly, ipywidgets, anywidget, jupyterlab. {LAB}"),
        (("bench", "explorers"), f"not installed: plotly, ipywidgets, anywidget. {LAB}"),
        (("bench", "model"), "run `pip install transformers==4.57.6`"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_says_in_one_line_what_is_missing(run, arguments, said):
    done = run(*arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert said in line


def test_gpu_tests_need_no_jupyter(make_environment, tmp_path):
    """In the clone, all GPU tests are found, and skipped only because there is no GPU."""
    place = make_environment(tmp_path / "env", [*requirements_of(), "pytest", "pytest-timeout", "hypothesis"])
    options = ("-m", "gpu", "-p", "no:cacheprovider")
    done = place.run("-m", "pytest", *options, cwd=ROOT, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = re.match(r"(\d+) skipped", done.stdout.splitlines()[-1])
    assert int(skipped[1]) >= 20
