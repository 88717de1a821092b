"""The package's compiled code: the C of `csrc/`, for fp32 on the CPU, where pip found a compiler to build it.

Each of its functions has a second form in PyTorch's operators, which runs wherever the compiled one cannot. Each is
registered as a PyTorch operator, `torch.ops.moe_edu.*`: tools that follow operators (FLOP counters, tensors without
memory, torch.compile, torch.jit.trace, torch.vmap) see it, and either support it or refuse it by name.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula


def why_not_compiled(dtype: torch.dtype) -> str | None:
    """Why PyTorch's operators compute in `dtype`; None where compiled code runs."""
    if dtype != torch.float32:
        return f"the compiled code takes float32, not {str(dtype).removeprefix('torch.')}"
    return _WHY_NOT


def vector_bits() -> int:
    """The width in bits of the vectors that the compiled code uses; 0 where it cannot run."""
    if _LIBRARY is None or _WHY_NOT is not None:
        return 0
    return int(_LIBRARY.vector_bits())


def can_be_compiled(*tensors: Tensor) -> bool:
    """Whether compiled code may read these tensors, as far as device and dtype are concerned.

    The caller checks shapes and strides: compiled code trusts them.
    """
    return _WHY_NOT is None and all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors
    )


def has_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation is in progress, whose tangents the operators here would silently lose."""
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def define_operator(
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> Any:
    """Register `kernel` as a PyTorch operator, and return it.

    Args:
        schema: `name(arguments) -> results` in PyTorch's notation.
        kernel: runs on every device; it checks what it passes to compiled code, since a traced graph may be called
            with tensors of other shapes than those it was traced with.
        fake: returns the results for tensors that have no memory.
        flops: counts FLOPs from the same arguments, with shapes in the place of tensors, and `out_shape`.
    """
    name = _OPERATORS.define(schema)
    _OPERATORS.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_edu::{name}", fake, lib=_OPERATORS)
    operator = getattr(torch.ops.moe_edu, name)
    register_flop_formula(operator)(flops)
    return operator.default


def call(function: str, *arguments: Tensor | int | Sequence[int] | None) -> None:
    """Run one of the functions of `csrc/`, on as many threads as PyTorch uses.

    Numbers are passed as `ptrdiff_t`, lists of numbers as arrays of them, tensors as pointers, None as a null pointer.
    """
    getattr(_LIBRARY, function)(*map(_convert, arguments), ctypes.c_int(torch.get_num_threads()))


def _convert(argument: Tensor | int | Sequence[int] | None) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_ssize_t(argument)
    return None if argument is None else (ctypes.c_ssize_t * len(argument))(*argument)


def _load_library() -> ctypes.CDLL | None:
    """The compiled library; None where it was not built or cannot be loaded."""
    spec = importlib.util.find_spec("moe_edu.kernels._compiled")
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:  # built on another system
        return None


def _why_not(library: ctypes.CDLL | None) -> str | None:
    if library is None:
        return "there was no C compiler when moe_edu was installed"
    if not library.is_supported():
        return "the compiled code needs the processor's AVX2 or AVX-512"
    return None


_LIBRARY = _load_library()
_WHY_NOT = _why_not(_LIBRARY)
_OPERATORS = torch.library.Library("moe_edu", "DEF")
