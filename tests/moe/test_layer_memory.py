"""A pass without gradients holds a small multiple of K * T * D numbers, whatever E is: counted, not measured."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_edu.config import MoEConfig
from moe_edu.moe.layer import SparseMLP

K = 2


class PeakOfLiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocated and that are alive, and remembers their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def tensors_in(values) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def peak_bytes(E: int, T: int, D: int, F: int = 32) -> int:
    """The peak of one inference of a sparse layer, including its routing."""
    config = MoEConfig(
        d_model=D, encoder_ffn_dim=F, encoder_attention_heads=1, decoder_attention_heads=1, num_experts=E
    )
    layer = SparseMLP(config).eval()
    hidden = torch.randn(1, T, D)
    with torch.no_grad(), PeakOfLiveBytes() as counter:
        layer(hidden)
    return counter.peak


def test_the_count_covers_what_is_alive_at_the_same_time():
    with PeakOfLiveBytes() as counter:
        one = torch.zeros(1000)
        two = one + 1  # 8,000 bytes
        del one
        three = two.view(10, 100) + two.view(10, 100)  # 8,000 again
        three.add_(1)
    assert counter.peak == 8000
    assert sum(counter.alive.values()) == 8000
    del two, three
    assert not counter.alive


@pytest.mark.parametrize(("E", "T", "D"), [(4, 512, 128), (64, 512, 128), (4, 2048, 128), (4, 512, 512)])
def test_a_few_times_the_rows(E, T, D):
    """The rows, their outputs and the mixed result, and little else: `transformers` holds E * T * D."""
    assert peak_bytes(E, T, D) < 4 * (K * T * D) * torch.float32.itemsize


def test_experts_add_nothing_but_their_columns_of_the_router():
    """Logits and probabilities, `[T, E]` each, are part of the result."""
    T, D = 512, 256
    few, many = peak_bytes(4, T, D), peak_bytes(64, T, D)
    assert many - few < 4 * T * 64 * torch.float32.itemsize
    assert many < 1.5 * few


@pytest.mark.parametrize(("T", "D"), [(2048, 256), (512, 1024)])
def test_four_times_the_tokens_or_the_width_take_four_times_the_memory(T, D):
    assert peak_bytes(4, T, D) / peak_bytes(4, 512, 256) == pytest.approx(4, rel=0.15)
