"""The published code beside ours: run where that release is installed, else what was saved when it was.

    @published.observed(saved=[8, 16])
    def capacities():
        ...  # uses transformers
    capacities()  # [8, 16], live or saved

Where it runs live, it must give what was saved: running the lesson holds the saved values to the release.
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
    """Whether transformers is here, in the release that the lessons speak of."""
    try:
        return version("transformers") == RELEASE
    except PackageNotFoundError:
        return False


def observed(saved: Value) -> Callable[[Callable[[], Value]], Callable[[], Value]]:
    """Make a function that looks at the release give `saved` where the release is not installed.

    Raises:
        AssertionError: when called, if the release gives something else.
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
    """A small sparse layer of the release, whose mask is flat, `[B * S]`; `fields` are its NllbMoeConfig's."""
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
