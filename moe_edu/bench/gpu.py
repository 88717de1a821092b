"""The sparse layer on a GPU: its back ends, the dense layer that does the same work, and a check of three promises.

The same code runs on the CPU with small sizes, and skips the checks that need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from moe_edu.bench.contenders import Contender, LayerSize, our_layer, with_backend
from moe_edu.bench.layer import Case, Factory, make_problem
from moe_edu.bench.libraries import megablocks, require_gpu, scattermoe, transformers_experts
from moe_edu.moe.experts import Backend
from moe_edu.moe.layer import SparseMLP

TOKENS = 16384
WIDTHS = (1024, 2048)
EXPERTS = (8, 32, 128)
DTYPES = (torch.bfloat16, torch.float16)
BACKENDS: tuple[Backend, ...] = ("auto", "padded")


def gpu_sizes() -> list[LayerSize]:
    """The sizes of the table: F = 4 D, with as many slots in inference as in training."""
    return [LayerSize(TOKENS, E, D, 4 * D, tight=True) for D in WIDTHS for E in EXPERTS]


def gpu_contenders(compiler: str = "inductor") -> dict[str, Factory]:
    """What is compared with the layer in its default form; `compiler` is a back end of torch.compile."""
    return {
        "moe_edu, padded": partial(_named_backend, "padded"),
        "moe_edu, loop": partial(_named_backend, "loop"),
        "moe_edu, compiled": partial(_compiled, compiler),
        "moe_edu, padded, CUDA graph": _graphed,
        "transformers 5, grouped": partial(transformers_experts, "grouped_mm"),
        "scattermoe": scattermoe,
        "megablocks": megablocks,
    }


def _named_backend(backend: Backend, layer: SparseMLP) -> Contender:
    return our_layer(with_backend(layer, backend))


def _compiled(compiler: str, layer: SparseMLP) -> Contender:
    torch.compiler.reset()  # it caches what it compiled for earlier layers, and refuses the ninth
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=compiler)
    return replace(our_layer(layer), forward=lambda hidden: compiled(hidden)[0])


def _graphed(layer: SparseMLP) -> Contender:
    """A CUDA graph of the padded back end, captured at the first call; it keeps its memory from then on."""
    require_gpu(layer)
    padded = with_backend(layer, "padded")
    graphs: dict[torch.Size, Callable[[Tensor], Tensor]] = {}

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape not in graphs:
            graphs[hidden.shape] = capture(padded, hidden)
        return graphs[hidden.shape](hidden)

    return replace(our_layer(padded), forward=forward)


def capture(layer: SparseMLP, hidden: Tensor) -> Callable[[Tensor], Tensor]:
    """`layer` as a CUDA graph for inputs like `hidden`: forward and, if gradients are on, backward."""
    sample = hidden.detach().clone().requires_grad_(hidden.requires_grad)
    graph = torch.cuda.make_graphed_callables(_OutputAlone(layer).train(layer.training), (sample,))
    return cast(Callable[[Tensor], Tensor], graph)


class _OutputAlone(nn.Module):
    """The layer without its routing: a CUDA graph returns only tensors."""

    def __init__(self, layer: SparseMLP) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden)[0]


class Check(NamedTuple):
    """One promise of one back end in one dtype: "yes", or why it was broken."""

    promise: str
    backend: str
    dtype: str
    outcome: str


def run_checks(
    size: LayerSize, dtype: torch.dtype, device: str, compiler: str = "inductor"
) -> Iterator[Check]:
    """Check each promise of each back end on a layer in training; two of them only on a GPU."""
    layer, hidden, _ = make_problem(Case(size, "training", dtype, torch.device(device)))
    checks: dict[str, Callable[[SparseMLP, Tensor], None]] = {
        "one graph in torch.compile": partial(check_one_graph, compiler)
    }
    if device == "cuda":
        checks["never waits for the GPU"] = check_never_waits
        checks["the same from a CUDA graph"] = check_cuda_graph
    for promise, check in checks.items():
        for backend in BACKENDS:
            try:
                check(with_backend(layer, backend), hidden)
                outcome = "yes"
            except Exception as error:  # the reader wants to know what broke the promise, whatever it was
                outcome = f"no: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            yield Check(promise, backend, str(dtype).removeprefix("torch."), outcome)


def check_never_waits(layer: SparseMLP, hidden: Tensor) -> None:
    """Forward and backward queue their kernels and never read a value back.

    Raises:
        RuntimeError: something synchronised.
    """
    _step(layer, hidden)  # libraries may synchronise once during set-up
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(layer, hidden)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def check_one_graph(compiler: str, layer: SparseMLP, hidden: Tensor) -> None:
    """torch.compile gives one graph, keeps it when T changes, and changes no value beyond rounding.

    Raises:
        torch._dynamo.exc.TorchDynamoException: a graph break, or a recompilation.
        AssertionError: a value differs.
    """
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=compiler)
    T = hidden.shape[1]
    for i, tokens in enumerate((T, T // 2, T - 3)):
        part = hidden[0, :tokens][None]  # in this order: the strides of a tensor of this size
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            _assert_close(_step(compiled, part), _step(layer, part))


def check_cuda_graph(layer: SparseMLP, hidden: Tensor) -> None:
    """A replayed graph gives the right output and gradient for another input.

    Raises:
        AssertionError: a value differs.
    """
    graph = capture(layer, hidden.detach().requires_grad_())
    other = hidden.flip(1).contiguous()
    _assert_close(_step(lambda x: (graph(x), None), other), _step(layer, other))


def _step(call: Callable[[Tensor], tuple[Tensor, object]], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input."""
    leaf = hidden.detach().requires_grad_()
    output, _ = call(leaf)
    output.backward(torch.ones_like(output))
    assert leaf.grad is not None
    return output.detach(), leaf.grad


def _assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Use one tolerance for each tensor: rounding errors of sums depend on their largest terms."""
    for mine, value in zip(actual, expected, strict=True):
        scale = value.abs().max().item()
        torch.testing.assert_close(mine, value, rtol=0, atol=8 * torch.finfo(value.dtype).eps * scale)
