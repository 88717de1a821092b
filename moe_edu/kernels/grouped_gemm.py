"""Grouped products: for every expert, the rows that belong to it times its weights.

Shapes: N rows sorted by expert, E experts, I inputs, O outputs. The first `sizes[0]` rows belong to expert 0, the next
`sizes[1]` to expert 1; rows behind the last expert's belong to nobody and come back as zeros. Weights are
`[E, O, I]`, as `torch.nn.Linear` keeps each of them.

Each product exists twice: one call of PyTorch an expert, the form to read, and `csrc/grouped_gemm.c` for all of them,
which is faster on the CPU, above all where an expert has few rows. It is built where there is a C compiler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from moe_edu.kernels.compiled import call, can_be_compiled

# Beyond so many rows an expert, on average, PyTorch's products of the backward pass are as fast as the compiled ones.
_FEW_ROWS = 256


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """`[N, O]`: `x[n] @ weight[e].T + bias[e]` for `x [N, I]` and `bias [E, O]`; into `out` where it is given."""
    y = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out
    if _can_be_compiled(sizes, x, y, weight, bias):
        _call("linear", [x, weight, bias, y], sizes, weight)
    else:
        for expert, rows in segments(sizes):
            torch.addmm(bias[expert], x[rows], weight[expert].T, out=y[rows])
    y[sum(sizes) :] = 0
    return y


def grad_input(grad_y: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """`[N, I]`: the gradient of `linear` with respect to `x`, from `grad_y [N, O]`."""
    grad_x = grad_y.new_empty(grad_y.shape[0], weight.shape[2])
    if _few_rows(sizes) and _can_be_compiled(sizes, grad_x, grad_y, weight):
        _call("grad_input", [grad_y, weight, grad_x], sizes, weight)
    else:
        for expert, rows in segments(sizes):
            torch.mm(grad_y[rows], weight[expert], out=grad_x[rows])
    grad_x[sum(sizes) :] = 0
    return grad_x


def grad_weight(grad_y: Tensor, x: Tensor, sizes: Sequence[int], out: Tensor) -> Tensor:
    """Write the gradient of `linear` with respect to `weight` into `out [E, O, I]`, and return it."""
    if _few_rows(sizes) and _can_be_compiled(sizes, x, grad_y, out):
        _call("grad_weight", [grad_y, x, out], sizes, out)
    else:
        for expert, rows in segments(sizes):
            torch.mm(grad_y[rows].T, x[rows], out=out[expert])
        for expert, size in enumerate(sizes):
            if size == 0:
                out[expert] = 0
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


def _few_rows(sizes: Sequence[int]) -> bool:
    return sum(sizes) <= _FEW_ROWS * sum(size > 0 for size in sizes)


def _can_be_compiled(
    sizes: Sequence[int], x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None
) -> bool:
    """Whether these are what compiled code may touch: it checks nothing, and PyTorch says what is wrong."""
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


def _call(product: str, operands: Sequence[Tensor], sizes: Sequence[int], weight: Tensor) -> None:
    """Run one of the functions of `csrc/grouped_gemm.c` over contiguous operands."""
    call(f"grouped_gemm_{product}", *operands, [*accumulate(sizes, initial=0)], *weight.shape)
