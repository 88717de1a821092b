"""Memory for large gradients on the CPU, kept from step to step."""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

# C libraries do not keep freed blocks of this size or more for the next request.
_LARGE_BYTES = 32 * 2**20


class GradientPages:
    """Lends memory for a layer's large gradients, and reclaims it once no tensor uses it.

    `zero_grad` frees the gradients. C libraries return blocks of 32 MiB and more to the system, so such a gradient
    needs new pages at every step; each one enters the system's kernel and, on a virtual machine, its host's as well,
    which can take longer than the layer's products. This class keeps as many blocks as were ever in use at once. They
    are freed with the layer; a copy of the layer starts without any.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)  # by size in bytes

    def __reduce__(self) -> tuple[type[GradientPages], tuple[()]]:
        return GradientPages, ()

    def empty_like(self, weight: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of the shape, dtype and device of `weight`."""
        size = weight.numel() * weight.element_size()
        if weight.device.type != "cpu" or size < _LARGE_BYTES:
            return torch.empty_like(weight, memory_format=torch.contiguous_format)
        free = self._free[size]
        try:
            block = free.pop()
        except IndexError:
            block = np.empty(size, np.uint8)  # on huge pages, where the system has them
        # Only the tensor and its views hold `lent`. List operations are thread-safe.
        lent = block.view()
        weakref.finalize(lent, free.append, block).atexit = False
        return torch.from_numpy(lent).view(weight.dtype).view(weight.shape)
