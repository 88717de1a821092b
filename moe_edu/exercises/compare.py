"""Compare an answer with what was expected: shapes first, then the share of values that are right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Comparison(NamedTuple):
    """How an answer compares.

    Attributes:
        right: values that agree.
        total: values that were expected.
        problem: what is wrong other than values (a type, a shape), or "".
    """

    right: int
    total: int
    problem: str = ""

    @property
    def agrees(self) -> bool:
        return not self.problem and self.right == self.total


def compare(got: Any, expected: Any, tolerance: float, name: str = "the result") -> Comparison:
    """Compare numbers, booleans, strings, tensors, and tuples, lists and dictionaries of them."""
    inside = name.removeprefix("the ")  # a part is "result[0]"
    if isinstance(expected, Tensor):
        return _compare_tensors(got, expected, tolerance, name)
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping) or got.keys() != expected.keys():
            return Comparison(
                0, 1, f"{name} should be a dictionary with the keys {', '.join(map(str, expected))}"
            )
        return _merged(
            [compare(got[key], expected[key], tolerance, f"{inside}[{key!r}]") for key in expected]
        )
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        if isinstance(got, Tensor) and got.ndim:
            got = got.tolist()
        if not isinstance(got, Sequence) or isinstance(got, str) or len(got) != len(expected):
            return Comparison(0, 1, f"{name} should hold {len(expected)} values, not be {describe(got)}")
        pairs = zip(got, expected, strict=True)
        return _merged(
            [compare(ours, theirs, tolerance, f"{inside}[{i}]") for i, (ours, theirs) in enumerate(pairs)]
        )
    if isinstance(got, Tensor) and got.numel() == 1:
        got = got.item()
    if isinstance(expected, float) or (isinstance(expected, int) and not isinstance(expected, bool)):
        if isinstance(got, bool) or not isinstance(got, int | float):
            return Comparison(0, 1, f"{name} should be a number, not {describe(got)}")
        return Comparison(int(math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance)), 1)
    if type(got) is not type(expected):
        return Comparison(0, 1, f"{name} should be {describe(expected)}, not {describe(got)}")
    return Comparison(int(got == expected), 1)


def describe(value: Any) -> str:
    """A value's type and shape, for messages."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{_article(dtype)} tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of length {len(value)}"
    return _article(type(value).__name__)


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _compare_tensors(got: Any, expected: Tensor, tolerance: float, name: str) -> Comparison:
    if not isinstance(got, Tensor):
        return Comparison(0, 1, f"{name} should be {describe(expected)}, not {describe(got)}")
    if got.layout != torch.strided:
        return Comparison(0, 1, f"{name} should be a dense tensor, not {got.layout}")
    if got.shape != expected.shape:
        shapes = f"{list(got.shape)} instead of {list(expected.shape)}"
        return Comparison(0, 1, f"{name} has shape {shapes}")
    whole = not expected.is_floating_point() and got.is_floating_point()  # cannot be used as an index
    if whole or (expected.dtype == torch.bool) != (got.dtype == torch.bool):
        return Comparison(0, 1, f"{name} should be {describe(expected)}, not {describe(got)}")
    same = torch.isclose(
        got.detach().double(), expected.detach().double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )
    return Comparison(int(same.sum()), same.numel())


def _merged(parts: Sequence[Comparison]) -> Comparison:
    problem = next((part.problem for part in parts if part.problem), "")
    return Comparison(sum(part.right for part in parts), sum(part.total for part in parts), problem)
