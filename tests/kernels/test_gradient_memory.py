"""Memory of large gradients is reused, but never while a tensor still holds it."""

import copy
import pickle
import threading

import pytest
import torch

from moe_edu.kernels.gradient_memory import GradientPages


@pytest.fixture(autouse=True)
def every_size_is_large(monkeypatch):
    monkeypatch.setattr("moe_edu.kernels.gradient_memory._LARGE_BYTES", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gives_a_tensor_like_the_weight(dtype):
    weight = torch.zeros(4, 3, 2, dtype=dtype).transpose(0, 2)
    gradient = GradientPages().empty_like(weight)
    assert gradient.shape == weight.shape
    assert gradient.dtype == dtype
    assert gradient.is_contiguous()
    assert torch.equal(gradient.fill_(3), torch.full_like(weight, 3))


def test_other_devices_keep_their_own_memory():
    weight = torch.zeros(4, 3, device="meta")
    assert GradientPages().empty_like(weight).device == weight.device


def test_freed_memory_is_reused():
    pages, weight = GradientPages(), torch.zeros(6, 4)
    first = pages.empty_like(weight)
    place = first.data_ptr()
    del first
    assert pages.empty_like(weight).data_ptr() == place
    assert pages.empty_like(torch.zeros(6, 8)).data_ptr() != place, "another size needs another block"


def test_memory_in_use_is_not_reused():
    pages, weight = GradientPages(), torch.zeros(6, 4)
    held = pages.empty_like(weight).fill_(1)
    view = pages.empty_like(weight).fill_(2)[1:3]  # its base is freed, but its memory is not
    for _ in range(3):
        pages.empty_like(weight).fill_(9)
    assert torch.equal(held, torch.ones(6, 4))
    assert torch.equal(view, torch.full((2, 4), 2.0))
    assert len({held.data_ptr(), view.data_ptr(), pages.empty_like(weight).data_ptr()}) == 3


def test_small_gradients_are_ordinary_tensors(monkeypatch):
    monkeypatch.setattr("moe_edu.kernels.gradient_memory._LARGE_BYTES", 1000)
    pages = GradientPages()
    del_me = pages.empty_like(torch.zeros(10))
    del del_me
    assert not pages._free


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pages: pickle.loads(pickle.dumps(pages))])
def test_a_copy_shares_no_memory(copied):
    pages, weight = GradientPages(), torch.zeros(6, 4)
    place = pages.empty_like(weight).data_ptr()
    other = copied(pages).empty_like(weight)
    assert other.data_ptr() != place
    assert pages.empty_like(weight).data_ptr() == place


def test_threads_never_share_a_block():
    pages, weight = GradientPages(), torch.zeros(300)
    wrong = []

    def work(number: int) -> None:
        for _ in range(300):
            gradient = pages.empty_like(weight).fill_(number)
            if not (gradient == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
