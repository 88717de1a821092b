"""What all tests share: one thread, hypothesis settings, skips with their reasons, a tiny configuration."""

import pytest
import torch
from hypothesis import settings

from moe_edu.config import MoEConfig
from moe_edu.kernels import compiled

# One thread: results repeat bit for bit, and several test runs can share a machine.
torch.set_num_threads(1)

settings.register_profile("moe_edu", deadline=None, max_examples=50)
settings.load_profile("moe_edu")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _progress_of_its_own(tmp_path, monkeypatch):
    """Exercises that tests solve are not the developer's."""
    monkeypatch.setenv("MOE_EDU_PROGRESS", str(tmp_path / "progress.json"))


@pytest.fixture(params=["compiled", "pytorch"])
def either_code(request, monkeypatch):
    """The test runs with the package's compiled code, and without it."""
    if request.param == "pytorch":
        monkeypatch.setattr(compiled, "_WHY_NOT", "the test runs without it")
    elif why_not := compiled.why_not_compiled(torch.float32):
        pytest.skip(why_not)


@pytest.fixture
def compiled_code():
    """The test is about the package's compiled code alone."""
    if why_not := compiled.why_not_compiled(torch.float32):
        pytest.skip(why_not)


@pytest.fixture(scope="session")
def tiny_config():
    """Make a small MoEConfig without dropout, whose weights are large enough to tell experts apart."""
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
