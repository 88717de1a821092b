"""The layer's promises on a GPU. `python -m pytest -m gpu` runs these; `moe-edu bench gpu` prints the table."""

import pytest
import torch

from moe_edu.bench.contenders import LayerSize, with_backend
from moe_edu.bench.gpu import (
    check_cuda_graph,
    check_never_waits,
    check_one_graph,
    gpu_contenders,
    gpu_sizes,
    run_checks,
)
from moe_edu.bench.layer import Case, make_problem, run_layer_bench

# Widths are multiples of 16 bytes, which CUDA's grouped product needs.
SIZE = LayerSize(tokens=96, experts=5, d_model=32, ffn_dim=64, tight=True)
DTYPES = [torch.bfloat16, torch.float16]


def problem(backend, dtype, device="cuda"):
    layer, hidden, _ = make_problem(Case(SIZE, "training", dtype, torch.device(device)))
    return with_backend(layer, backend), hidden


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "padded"])
class TestPromises:
    def test_neither_forward_nor_backward_waits_for_the_gpu(self, backend, dtype):
        check_never_waits(*problem(backend, dtype))

    def test_one_compiled_graph_serves_every_number_of_tokens(self, backend, dtype):
        check_one_graph("inductor", *problem(backend, dtype))

    def test_a_cuda_graph_replays_forward_and_backward(self, backend, dtype):
        check_cuda_graph(*problem(backend, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_benchmark_measures_every_form_of_the_layer(dtype):
    for result in run_layer_bench([SIZE], contenders=gpu_contenders(), repeats=1, dtype=dtype, device="cuda"):
        assert {"moe_edu, padded", "moe_edu, compiled", "moe_edu, padded, CUDA graph"} <= result.others.keys()
        assert result.ours.peak_mb > 0


def test_sizes_are_those_of_the_table():
    sizes = gpu_sizes()
    assert {(size.d_model, size.experts) for size in sizes} == {
        (D, E) for D in (1024, 2048) for E in (8, 32, 128)
    }
    assert all(size.tokens == 16384 and size.ffn_dim == 4 * size.d_model for size in sizes)
    assert all(size.config().moe_eval_capacity_token_fraction < 0 for size in sizes)


def test_every_size_of_the_table_is_compiled():
    """No limit stops a process from compiling one layer after another."""
    compiled = gpu_contenders("eager")["moe_edu, compiled"]
    for d_model in range(4, 4 + len(gpu_sizes()) * len(DTYPES)):
        size = LayerSize(tokens=8, experts=3, d_model=d_model, ffn_dim=8, tight=True)
        layer, hidden, _ = make_problem(Case(size, "training", torch.float32, torch.device("cpu")))
        compiled(with_backend(layer, "padded")).forward(hidden)


class TestChecksOnTheCPU:
    """Checks that need no GPU run here in the same way."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_graph(self, dtype):
        check_one_graph("eager", *problem("padded", dtype, "cpu"))

    def test_a_recompilation_is_noticed(self, monkeypatch):
        layer, hidden = problem("padded", torch.bfloat16, "cpu")
        forward = type(layer).forward

        def forward_by_size(self, hidden):
            return forward(self, hidden if hidden.shape[1] > 50 else hidden + 0)

        monkeypatch.setattr(type(layer), "forward", forward_by_size)
        with pytest.raises(torch._dynamo.exc.RecompileError):
            check_one_graph("eager", layer, hidden)

    def test_a_broken_promise_is_reported(self):
        """The CPU's loop over the experts reads their row counts, which breaks the graph."""
        outcomes = {
            check.backend: check.outcome for check in run_checks(SIZE, torch.bfloat16, "cpu", "eager")
        }
        assert outcomes["padded"] == "yes"
        assert outcomes["auto"].startswith("no: ")
