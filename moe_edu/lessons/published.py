"""The published code, to compare with ours: run if that release is installed, otherwise its saved results.

    @published.observed(saved=[8, 16])
    def capacities():
        ...  # uses transformers
    capacities()  # [8, 16], live or saved

Live results must equal the saved ones, so running the lesson checks the saved values against the release.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

RELEASE = "4.57.6"
Value = TypeVar("Value")


def is_installed() -> bool:
    """Whether transformers is installed, in the release that the lessons use."""
    try:
        return version("transformers") == RELEASE
    except PackageNotFoundError:
        return False


def observed(saved: Value) -> Callable[[Callable[[], Value]], Callable[[], Value]]:
    """Make a function that observes the release return `saved` if the release is not installed.

    Raises:
        AssertionError: when called, if the release returns something else.
    """

    def decorate(look: Callable[[], Value]) -> Callable[[], Value]:
        @functools.wraps(look)
        def wrapped() -> Value:
            if not is_installed():
                return saved
            seen = look()
            assert seen == saved, f"transformers {RELEASE} gives {seen!r}, but {saved!r} was saved"
            return seen

        return wrapped

    return decorate


def sparse_layer(num_experts: int = 4, d_model: int = 8, seed: int = 0, **fields: object) -> NllbMoeSparseMLP:
    """A small sparse layer of the release, which takes a flat mask, `[B * S]`; `fields` are its NllbMoeConfig's."""
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    torch.manual_seed(seed)
    config = {
        "d_model": d_model,
        "num_experts": num_experts,
        "expert_capacity": None,
        "moe_token_dropout": 0.0,
    }
    return NllbMoeSparseMLP(NllbMoeConfig(**{**config, **fields}), ffn_dim=12)
