"""What readers learn about their machine."""

import os
import platform

import pytest
import torch

from moe_edu.system.machine import Machine, advise, this_machine

LAPTOP = Machine(
    python="3.12.1",
    torch="2.13.0+cpu",
    system="Linux-6.1",
    processor="A processor",
    cores=8,
    threads=4,
    memory_gb=16.6,
)


def test_describes_this_machine():
    machine = this_machine()
    assert machine.python == platform.python_version()
    assert machine.torch == torch.__version__
    assert machine.processor
    assert machine.threads == torch.get_num_threads()
    assert 1 <= machine.cores <= os.cpu_count()
    assert machine.memory_gb is None or 0.1 < machine.memory_gb < 1e5
    assert (machine.gpu is not None) == torch.cuda.is_available()
    assert advise(machine)


def test_a_container_may_use_less_than_the_machine_has(tmp_path, monkeypatch):
    whole = this_machine().memory_gb
    limits = tmp_path / "memory.max", tmp_path / "absent"
    monkeypatch.setattr("moe_edu.system.machine._MEMORY_LIMITS", [str(path) for path in limits])
    limits[0].write_text("50000000\n")
    assert this_machine().memory_gb == (None if whole is None else 0.05)
    limits[0].write_text("max\n")
    assert whole is None or this_machine().memory_gb > 0.05


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "8 CPU cores are more than enough"),
        ({}, "17 GB of memory is plenty"),
        ({}, "PyTorch finds no GPU, and you need none."),
        ({"cores": 1}, "One CPU core is enough"),
        ({"memory_gb": 0.5}, "0.5 GB of memory is little: close other programs"),
        ({"memory_gb": 2.0}, "2.0 GB of memory is enough for one lesson at a time"),
        ({"memory_gb": None}, "does not report how much memory"),
        ({"gpu": "Tesla T4", "gpu_memory_gb": 15.8}, "Training will use your Tesla T4, with 16 GB"),
        ({"torch": "2.9.1"}, "PyTorch 2.9.1 is too old: install 2.10 or newer."),
    ],
)
def test_advice(change, said):
    assert any(said in sentence for sentence in advise(LAPTOP._replace(**change)))


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cu130", "3.0.0a0+git123"])
def test_a_new_pytorch_is_not_mentioned(version):
    assert not any(
        "PyTorch" in sentence and "old" in sentence for sentence in advise(LAPTOP._replace(torch=version))
    )
