"""Which back end multiplies the experts' rows, and why. The back ends themselves are in `experts.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from moe_edu.kernels.compiled import why_not_compiled

if TYPE_CHECKING:
    from moe_edu.moe.experts import Experts

Backend = Literal["auto", "loop", "grouped", "padded"]

# "auto" pads where that makes at most so many slots a row, with one row more an expert. In training there is about one.
# Where every expert has room for every token there are E / 2, which take memory as E * T * D does, and as much time.
_SLOTS_PER_ROW = 4


class BackendChoice(NamedTuple):
    """The back end that runs, and why."""

    backend: Backend
    reason: str


def explain_backend(
    experts: Experts, dtype: torch.dtype | None = None, rows: int = 0, capacity: int = 0
) -> BackendChoice:
    """Which back end `experts`, such as `SparseMLP(config).experts`, runs where it is now, and why.

    Args:
        experts: their weights' device and widths decide.
        dtype: of the products, which under autocast is autocast's; None for that of the weights.
        rows, capacity: N rows in experts with room for `capacity` each, which decide where the products would have to
            be padded; by default about as much room as rows, as in training.
    """
    if experts.backend != "auto":
        return BackendChoice(experts.backend, "it was named when the layer was made")
    device, E = experts.w1.device, experts.w1.shape[0]
    slots = E * min(capacity, rows)
    return choose_backend(
        device, dtype or experts.w1.dtype, experts.w1.shape, slots <= _SLOTS_PER_ROW * (rows + E)
    )


def choose_backend(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int], few_slots: bool = True
) -> BackendChoice:
    """The back end that "auto" stands for: grouped products where the device has them, padded ones elsewhere.

    Args:
        device, dtype: of the products.
        shape: E, F and D.
        few_slots: whether padding would leave few slots empty.
    """
    if device.type != "cuda":
        why_not = why_not_compiled(dtype)
        how = "compiled for few rows" if why_not is None else f"PyTorch's: {why_not}"
        return BackendChoice(
            "grouped", f"on {device.type} products over exactly each expert's rows are fastest ({how})"
        )
    why_not = why_no_grouped_mm(device, dtype, shape)
    if why_not is None:
        return BackendChoice("grouped", "CUDA multiplies the rows of all experts in one grouped product")
    if few_slots:
        return BackendChoice("padded", why_not)
    return BackendChoice(
        "grouped",
        f"one product an expert: {why_not}, and padding would make more than {_SLOTS_PER_ROW} slots a row",
    )


def why_no_grouped_mm(device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """Why PyTorch has no grouped product that stays on the GPU, for weights `[E, F, D]`; None where it has.

    Sources: pytorch, aten/src/ATen/native/cuda/GroupedBlas.cpp, whose `_grouped_mm` also takes other GPUs and dtypes,
    and then copies the offsets to the host and loops over the experts; GroupMM.cu, for the rest.
    """
    E, *widths = shape
    if device.type != "cuda":
        return "only CUDA has one"
    if dtype != torch.bfloat16:
        return f"CUDA's grouped product takes bfloat16, not {str(dtype).removeprefix('torch.')}"
    for width in widths:
        if width * dtype.itemsize % 16 != 0:
            return f"CUDA's grouped product takes rows of whole 16 bytes, not {width * dtype.itemsize}"
    if E >= 1024:
        return f"CUDA's grouped product takes fewer than 1,024 experts, not {E}"
    if sys.platform == "win32":
        return "PyTorch does not build CUDA's grouped product for Windows"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10):
        return f"CUDA's grouped product takes GPUs of compute capability 9 and 10, not {major}.{minor}"
    return None
