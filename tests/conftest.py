"""Shared by all tests: one thread, hypothesis settings, markers by folder, a tiny configuration."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from moe_edu.config import MoEConfig
from moe_edu.kernels import compiled

# One thread, here and in the processes that tests start: results repeat bit for bit, and workers share the machine.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Exercises that tests or notebooks solve must not count as the developer's own.
_HOME = tempfile.TemporaryDirectory()
os.environ["MOE_EDU_PROGRESS"] = str(Path(_HOME.name) / "progress.json")

settings.register_profile("moe_edu", deadline=None, max_examples=50)
settings.load_profile("moe_edu")

# Tests that `make quick` leaves out, longest first: started early, they do not keep one worker waiting for the other.
SLOW = (
    "tests/browser/test_notebooks_in_lab.py",
    "tests/project/test_clean_environment.py",
    "tests/browser",
    "tests/project/test_notebooks.py::test_runs",
    "tests/project/test_notebooks.py::TestLesson07",
    "notebooks",
    "tests/training",
    "tests/experiments",
)
# The saved outputs of these lessons come from minutes of training.
FULL_TRAINING = ("notebooks/07_", "notebooks/09_")


def pytest_ignore_collect(collection_path, config):
    """With `-m gpu`, read only files that have such tests: a machine used only for computing may lack Jupyter."""
    if config.getoption("markexpr") != "gpu" or collection_path == config.rootpath / "tests":
        return None
    folder = collection_path.is_dir()
    files = collection_path.rglob("test_*.py") if folder else [collection_path]
    return None if any("mark.gpu" in path.read_text("utf-8") for path in files) else True


@pytest.hookimpl(tryfirst=True)  # -m reads the markers
def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="no NVIDIA GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker("slow")
        if item.nodeid.startswith(FULL_TRAINING):
            item.add_marker("nightly")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
    items.sort(key=_rank)


def _rank(item):
    return next((rank for rank, start in enumerate(SLOW) if item.nodeid.startswith(start)), len(SLOW))


@pytest.fixture(autouse=True)
def _seed_and_one_thread():
    """Each test draws the same random numbers, on one thread, whichever test ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _progress_of_its_own(tmp_path, monkeypatch):
    """No test sees the exercises that another has solved."""
    monkeypatch.setenv("MOE_EDU_PROGRESS", str(tmp_path / "progress.json"))


@pytest.fixture(params=["compiled", "pytorch"])
def either_code(request, monkeypatch):
    """The test runs twice: with the package's compiled code, and without it."""
    if request.param == "pytorch":
        monkeypatch.setattr(compiled, "_WHY_NOT", "the test runs without it")
    elif why_not := compiled.why_not_compiled(torch.float32):
        pytest.skip(why_not)


@pytest.fixture
def compiled_code():
    """The test concerns only the package's compiled code."""
    if why_not := compiled.why_not_compiled(torch.float32):
        pytest.skip(why_not)


@pytest.fixture(scope="session")
def tiny_config():
    """Make a small MoEConfig without dropout, with weights large enough to make the experts differ visibly."""
    defaults = {
        "vocab_size": 29,
        "max_position_embeddings": 16,
        "d_model": 8,
        "encoder_layers": 2,
        "encoder_ffn_dim": 12,
        "encoder_attention_heads": 2,
        "encoder_layerdrop": 0.0,
        "encoder_sparse_step": 2,
        "decoder_layers": 2,
        "decoder_ffn_dim": 10,
        "decoder_attention_heads": 2,
        "decoder_layerdrop": 0.0,
        "decoder_sparse_step": 2,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.3,
        "num_experts": 4,
        "moe_token_dropout": 0.0,
    }

    def make(**fields) -> MoEConfig:
        return MoEConfig(**{**defaults, **fields})

    return make
