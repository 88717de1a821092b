"""Grouped products: for every expert, the rows that belong to it times its weights.

Shapes: N rows sorted by expert, E experts, I inputs, O outputs. The first `sizes[0]` rows belong to expert 0, the next
`sizes[1]` to expert 1; rows after the last expert's belong to no expert, and their results are zeros. Weights are
`[E, O, I]`: one matrix per expert, stored as in `torch.nn.Linear`.

Each product exists twice: as one PyTorch call per expert, the form to read, and as one call of `csrc/grouped_gemm.c`
for all experts, which is faster on the CPU, above all for experts with few rows. It needs a C compiler to build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from moe_edu.kernels.compiled import call, can_be_compiled, define_operator, has_tangent

# In the backward pass, PyTorch is as fast as compiled code with more than this many rows per expert on average.
_FEW_ROWS = 256


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """`[N, O]`: `x[n] @ weight[e].T + bias[e]` for `x [N, I]` and `bias [E, O]`; written to `out` where it is given."""
    y = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out
    product = _linear_by_pytorch if has_tangent(x, weight, bias) else _linear
    product(x, weight, bias, sizes, y)
    y[sum(sizes) :] = 0
    return y


def grad_input(grad_y: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """`[N, I]`: the gradient of `linear` with respect to `x`, from `grad_y [N, O]`."""
    grad_x = grad_y.new_empty(grad_y.shape[0], weight.shape[2])
    product = _grad_input_by_pytorch if has_tangent(grad_y, weight) else _grad_input
    product(grad_y, weight, sizes, grad_x)
    grad_x[sum(sizes) :] = 0
    return grad_x


def grad_weight(grad_y: Tensor, x: Tensor, sizes: Sequence[int], out: Tensor) -> Tensor:
    """Write the gradient of `linear` with respect to `weight` into `out [E, O, I]`, and return it."""
    product = _grad_weight_by_pytorch if has_tangent(grad_y, x) else _grad_weight
    product(grad_y, x, sizes, out)
    return out


def grad_bias(grad_y: Tensor, sizes: Sequence[int]) -> Tensor:
    """`[E, O]`: the gradient of `linear` with respect to `bias`."""
    total = grad_y.new_zeros(len(sizes), grad_y.shape[1])
    for expert, rows in segments(sizes):
        torch.sum(grad_y[rows], dim=0, out=total[expert])
    return total


def segments(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for the experts that have any."""
    for expert, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        if size:
            yield expert, slice(end - size, end)


# ---- one PyTorch call per expert


def _linear_by_pytorch(x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], out: Tensor) -> None:
    for expert, rows in segments(sizes):
        torch.addmm(bias[expert], x[rows], weight[expert].T, out=out[rows])


def _grad_input_by_pytorch(grad_y: Tensor, weight: Tensor, sizes: Sequence[int], out: Tensor) -> None:
    for expert, rows in segments(sizes):
        torch.mm(grad_y[rows], weight[expert], out=out[rows])


def _grad_weight_by_pytorch(grad_y: Tensor, x: Tensor, sizes: Sequence[int], out: Tensor) -> None:
    for expert, rows in segments(sizes):
        torch.mm(grad_y[rows].T, x[rows], out=out[expert])
    for expert, size in enumerate(sizes):
        if size == 0:
            out[expert] = 0


# ---- operators that run compiled code where they can


def _run_linear(x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], out: Tensor) -> None:
    if _can_be_compiled(sizes, x, out, weight, bias):
        call("grouped_gemm_linear", x, weight, bias, out, _starts(sizes), *weight.shape)
    else:
        _linear_by_pytorch(x, weight, bias, sizes, out)  # or PyTorch says what is wrong


def _run_grad_input(grad_y: Tensor, weight: Tensor, sizes: Sequence[int], out: Tensor) -> None:
    if _few_rows(sizes) and _can_be_compiled(sizes, out, grad_y, weight):
        call("grouped_gemm_grad_input", grad_y, weight, out, _starts(sizes), *weight.shape)
    else:
        _grad_input_by_pytorch(grad_y, weight, sizes, out)


def _run_grad_weight(grad_y: Tensor, x: Tensor, sizes: Sequence[int], out: Tensor) -> None:
    if _few_rows(sizes) and _can_be_compiled(sizes, x, grad_y, out):
        call("grouped_gemm_grad_weight", grad_y, x, out, _starts(sizes), *out.shape)
    else:
        _grad_weight_by_pytorch(grad_y, x, sizes, out)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [*accumulate(sizes, initial=0)]


def _few_rows(sizes: Sequence[int]) -> bool:
    return sum(sizes) <= _FEW_ROWS * sum(size > 0 for size in sizes)


def _can_be_compiled(
    sizes: Sequence[int], x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None
) -> bool:
    """Whether compiled code may touch these tensors; it checks nothing itself."""
    E, outputs, inputs = weight.shape
    rows = sum(sizes)
    shapes = {x: (max(rows, len(x)), inputs), y: (max(rows, len(y)), outputs)}
    if bias is not None:
        shapes[bias] = (E, outputs)
    return (
        can_be_compiled(weight, *shapes)
        and len(sizes) == E
        and min(sizes, default=0) >= 0
        and all(tensor.shape == shape for tensor, shape in shapes.items())
        and all(tensor.is_contiguous() for tensor in (weight, *shapes))
    )


def _count_flops(rows_shape: Sequence[int], other_shape: Sequence[int], *rest: Any, **_: Any) -> int:
    """Two FLOPs per multiplication: each row of an expert is multiplied by each of its weights."""
    sizes, out_shape = rest[-2:]
    *_experts, outputs, inputs = out_shape if len(out_shape) == 3 else other_shape
    return 2 * sum(sizes) * inputs * outputs


def _define(name: str, operands: str, kernel: Callable[..., None]) -> Callable[..., None]:
    """An operator that writes its result into `out`."""
    schema = f"grouped_{name}({operands}, SymInt[] sizes, Tensor(a!) out) -> ()"
    operator: Callable[..., None] = define_operator(
        schema, kernel, fake=lambda *operands: None, flops=_count_flops
    )
    return operator


_linear = _define("linear", "Tensor x, Tensor weight, Tensor bias", _run_linear)
_grad_input = _define("grad_input", "Tensor grad_y, Tensor weight", _run_grad_input)
_grad_weight = _define("grad_weight", "Tensor grad_y, Tensor x", _run_grad_weight)
