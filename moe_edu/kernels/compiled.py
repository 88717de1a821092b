"""The package's compiled code: the C of `csrc/`, for fp32 on the CPU, where pip found a compiler to build it.

Each of its functions has a form in PyTorch's operators beside it, which serves wherever this code does not.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def why_not_compiled(dtype: torch.dtype) -> str | None:
    """Why PyTorch's operators compute in `dtype`; None where compiled code serves."""
    if dtype != torch.float32:
        return f"the compiled code takes float32, not {str(dtype).removeprefix('torch.')}"
    if _LIBRARY is None:
        return "no C compiler was there when moe_edu was installed"
    if not _LIBRARY.is_supported():
        return "the compiled code needs the processor's AVX2 or AVX-512"
    return None


def can_be_compiled(*tensors: Tensor) -> bool:
    """Whether compiled code may touch these, as far as device, dtype and PyTorch's modes are concerned.

    The shapes and strides are for the caller to check: compiled code trusts them.
    """
    return (
        not _is_watched()
        and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and why_not_compiled(torch.float32) is None
    )


def _is_watched() -> bool:
    """Whether somebody follows PyTorch's operators, and would not see compiled code."""
    return (
        torch._C._len_torch_dispatch_stack() > 0  # counts FLOPs, or infers shapes from tensors without memory
        or torch._C._functorch.peek_interpreter_stack() is not None  # torch.func: vmap, jvp, ...
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def call(function: str, *arguments: Tensor | int | Sequence[int] | None) -> None:
    """Run one of the functions of `csrc/`, on as many threads as PyTorch has.

    Numbers arrive as `ptrdiff_t`, lists of numbers as arrays of them, tensors as pointers and None as the null pointer.
    """
    getattr(_LIBRARY, function)(*map(_convert, arguments), ctypes.c_int(torch.get_num_threads()))


def _convert(argument: Tensor | int | Sequence[int] | None) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_ssize_t(argument)
    return None if argument is None else (ctypes.c_ssize_t * len(argument))(*argument)


def _load_library() -> ctypes.CDLL | None:
    """None where it was not built."""
    spec = importlib.util.find_spec("moe_edu.kernels._compiled")
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:  # built on another system
        return None


_LIBRARY = _load_library()
