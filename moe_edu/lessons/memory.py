"""How much memory tensors take while a function runs, the same number on every system."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], object]) -> int:
    """The largest number of bytes that tensors made by `call` occupy at the same time, its result included.

    Counts what each PyTorch operation returns, forward and backward; not what an operation needs inside itself.
    """
    with _PeakCounter() as counter:
        call()
    return counter.peak


class _PeakCounter(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._alive: dict[int, int] = {}  # address of each storage made here: its bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in given and address not in self._alive:  # a view or an in-place result is not new
                self._alive[address] = storage.nbytes()
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, address)
        return result

    def _free(self, address: int) -> None:
        self.held -= self._alive.pop(address)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
