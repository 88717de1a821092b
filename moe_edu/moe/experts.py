"""The experts: stacked feed-forward weights, and the back ends that multiply sorted rows by them.

Shapes: N rows sorted by expert, E experts, D model width, F feed-forward width. `counts[e]` rows belong to expert e;
rows after the last expert's belong to no expert, and their outputs are zeros.

Every back end computes the same outputs:

* `loop`: one expert after the other, in plain PyTorch; the form to read. Hugging Face (transformers 5): `eager`.
* `padded`: one batched product over E experts with the same number of slots each, some of them empty. Hugging Face's
  `batched_mm` is also a batched product, but copies the expert's weights for each row.
* `grouped`: exactly each expert's rows, with the products and the backward pass of `moe_edu.kernels.grouped_gemm`.
  Hugging Face has no counterpart.
* `grouped_mm`: exactly each expert's rows in one call of PyTorch's grouped product. Hugging Face: `grouped_mm`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_edu.config import MoEConfig
from moe_edu.kernels import grouped_gemm
from moe_edu.kernels.compiled import why_not_compiled
from moe_edu.kernels.gradient_memory import GradientPages

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}

NamedBackend = Literal["loop", "padded", "grouped", "grouped_mm"]
Backend = Literal["auto", NamedBackend]

# "auto" pads if that makes at most this many slots per row, counting one extra row per expert. In training there is
# about one slot per row. Where every expert has room for every token there are E / 2: memory and time then grow as
# E * T * D.
_SLOTS_PER_ROW = 4


class Experts(nn.Module):
    """E feed-forward networks `fc2(dropout(act(fc1(x))))` with stacked weights.

    Parameters: `w1 [E, F, D]`, `b1 [E, F]`, `w2 [E, D, F]`, `b2 [E, D]`.

    Args:
        config: sizes, activation and dropout.
        ffn_dim: F; None for `config.encoder_ffn_dim`.
        backend: one of those above, which then runs on every device; "auto" picks one by device, dtype and sizes, see
            `explain_backend`.

    Raises:
        ValueError: there is no such back end.
    """

    def __init__(self, config: MoEConfig, ffn_dim: int | None = None, backend: Backend = "auto") -> None:
        super().__init__()
        if backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}")
        E, D, F_ = config.num_experts, config.d_model, ffn_dim or config.encoder_ffn_dim
        self.act = ACTIVATIONS[config.activation_function]
        self.dropout = config.activation_dropout
        self.backend: Backend = backend
        self.pages = GradientPages()
        self.w1 = nn.Parameter(torch.empty(E, F_, D))
        self.b1 = nn.Parameter(torch.zeros(E, F_))
        self.w2 = nn.Parameter(torch.empty(E, D, F_))
        self.b2 = nn.Parameter(torch.zeros(E, D))
        nn.init.normal_(self.w1, std=config.init_std)
        nn.init.normal_(self.w2, std=config.init_std)

    def extra_repr(self) -> str:
        E, F_, D = self.w1.shape
        return f"num_experts={E}, d_model={D}, ffn_dim={F_}, backend={self.backend!r}"

    def forward(self, rows: Tensor, counts: Tensor, capacity: int) -> Tensor:
        """Outputs `[N, D]` for rows `[N, D]` sorted by expert; no entry of counts `[E]` exceeds `capacity`."""
        dtype = rows.dtype
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        rows, *weights = (t.to(dtype) for t in (rows, self.w1, self.b1, self.w2, self.b2))
        backend = self.backend
        if backend == "auto":
            backend = choose_backend(rows.device, dtype, self.w1.shape, rows.shape[0], capacity)
        match backend:
            case "loop":
                return _loop(rows, counts, self._hidden, weights)
            case "padded":
                return _padded(rows, counts, min(capacity, rows.shape[0]), self._hidden, weights)
            case "grouped_mm":
                return _grouped_mm(rows, counts, self._hidden, weights)
            case "grouped" if torch.is_grad_enabled():
                return _grouped(rows, counts, self._hidden, weights, self.pages)
            case "grouped":
                return _grouped_inference(rows, counts, self._hidden, weights)

    def _hidden(self, pre_activation: Tensor) -> Tensor:
        # ReLU runs in place, since its gradient needs only its result: `[N, F]` is the layer's largest tensor.
        hidden = pre_activation.relu_() if self.act is F.relu else self.act(pre_activation)
        if self.training and self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout)
        return hidden


# ---- which back end, and why


class BackendChoice(NamedTuple):
    """What `explain_backend` returns.

    Attributes:
        backend: the name of the back end that runs.
        reason: why this one runs, in words.
    """

    backend: NamedBackend
    reason: str


def explain_backend(
    module: nn.Module, dtype: torch.dtype | None = None, rows: int = 0, capacity: int = 0
) -> BackendChoice:
    """Which back end the experts in `module` run on their current device, and why.

    Args:
        module: a sparse layer, its experts, or a model whose sparse layers all run the same back end.
        dtype: of the products; under autocast, autocast's. None for that of the weights.
        rows, capacity: N rows, and the slots per expert, which matter where the products may have to be padded; by
            default there are about as many slots as rows, as in training.

    Returns:
        The back end and the reason. Nothing is computed, and nothing in `module` changes.

    Raises:
        ValueError: `module` has no experts, or layers that run different back ends.
    """
    choices = {
        name: _explain(experts, dtype or experts.w1.dtype, rows, capacity)
        for name, experts in module.named_modules()
        if isinstance(experts, Experts)
    }
    if not choices:
        raise ValueError(
            f"{type(module).__name__} has no experts, so no back end runs: give it a sparse layer (`SparseMLP`), or a "
            "model whose encoder_sparse_step or decoder_sparse_step makes layers sparse"
        )
    if len(set(choices.values())) > 1:
        listed = "; ".join(f"{name} runs {choice.backend}" for name, choice in choices.items())
        raise ValueError(f"the layers of this model differ; ask about one of them: {listed}")
    return next(iter(choices.values()))


def _explain(experts: Experts, dtype: torch.dtype, rows: int, capacity: int) -> BackendChoice:
    if experts.backend != "auto":
        return BackendChoice(experts.backend, "the layer was made with this back end named")
    return explain_choice(experts.w1.device, dtype, experts.w1.shape, rows, capacity)


def choose_backend(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int], rows: int = 0, capacity: int = 0
) -> NamedBackend:
    """The back end that "auto" stands for.

    CPUs run `grouped`. CUDA runs `grouped_mm` where it can, else `padded`, or `grouped` where that pads too much.

    Args:
        device, dtype: of the products.
        shape: E, F and D.
        rows, capacity: as for `explain_backend`.
    """
    if device.type != "cuda":
        return "grouped"
    if grouped_mm_obstacle(device, dtype, shape) is None:
        return "grouped_mm"
    E = shape[0]
    return "padded" if E * min(capacity, rows) <= _SLOTS_PER_ROW * (rows + E) else "grouped"


def explain_choice(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int], rows: int = 0, capacity: int = 0
) -> BackendChoice:
    """`choose_backend` with its reason."""
    backend = choose_backend(device, dtype, shape, rows, capacity)
    if device.type != "cuda":
        why_not = why_not_compiled(dtype)
        how = "compiled for few rows" if why_not is None else f"PyTorch's: {why_not}"
        reason = f"on {device.type}, products over exactly each expert's rows are fastest ({how})"
        return BackendChoice(backend, reason)
    obstacle = grouped_mm_obstacle(device, dtype, shape)
    if obstacle is None:
        return BackendChoice(backend, "CUDA multiplies the rows of all experts in one grouped product")
    reason = str(obstacle)
    if backend == "grouped":
        reason = f"one product per expert: {reason}, and padding would make more than {_SLOTS_PER_ROW} slots per row"
    return BackendChoice(backend, reason)


class Obstacle(NamedTuple):
    """Why PyTorch has no grouped product here: a rule, and what breaks it. The sentence is formatted only on demand."""

    rule: str
    found: object

    def __str__(self) -> str:
        return f"{self.rule}, not {self.found}"


def grouped_mm_obstacle(device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> Obstacle | None:
    """Why CUDA has no grouped product that stays on the GPU, for weights `[E, F, D]`; None where it has one.

    Sources: PyTorch's aten/src/ATen/native/cuda/GroupedBlas.cpp, whose `_grouped_mm` also takes other GPUs and dtypes,
    but then copies the offsets to the host and loops over the experts; GroupMM.cu for the other rules.
    """
    E, *widths = shape
    if dtype != torch.bfloat16:
        return Obstacle("CUDA's grouped product takes torch.bfloat16", dtype)
    for width in widths:
        if width * dtype.itemsize % 16 != 0:
            return Obstacle(
                "CUDA's grouped product takes rows in multiples of 16 bytes", width * dtype.itemsize
            )
    if E >= 1024:
        return Obstacle("CUDA's grouped product takes fewer than 1,024 experts", E)
    if sys.platform == "win32":
        return Obstacle("PyTorch builds CUDA's grouped product for Linux", "Windows")
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in (9, 10):
        return Obstacle("CUDA's grouped product takes GPUs of compute capability 9 and 10", capability)
    return None


# ---- the back ends


Weights = Sequence[Tensor]  # w1, b1, w2, b2 in the dtype of the rows

# A pass without gradients holds the hidden activations of at most this many rows, even if one expert has them all.
_ROWS_AT_ONCE = 2048


def _loop(rows: Tensor, counts: Tensor, hidden: Callable[[Tensor], Tensor], weights: Weights) -> Tensor:
    """One expert after the other: the form to read."""
    outputs = torch.zeros_like(rows)
    for expert, segment in grouped_gemm.segments(counts.tolist()):
        w1, b1, w2, b2 = (weight[expert] for weight in weights)
        outputs[segment] = F.linear(hidden(F.linear(rows[segment], w1, b1)), w2, b2)
    return outputs


def _grouped_inference(
    rows: Tensor, counts: Tensor, hidden: Callable[[Tensor], Tensor], weights: Weights
) -> Tensor:
    """`_grouped` without gradients, on a bounded number of rows at a time."""
    w1, b1, w2, b2 = weights
    outputs = torch.empty_like(rows, memory_format=torch.contiguous_format)
    inner = rows.new_empty(min(_ROWS_AT_ONCE, len(rows)), w1.shape[1])  # reused by all portions
    start = 0
    for experts, sizes in _portions(counts.tolist(), _ROWS_AT_ONCE):
        portion = slice(start, start + sum(sizes))
        x = inner[: sum(sizes)]
        grouped_gemm.linear(rows[portion], w1[experts], b1[experts], sizes, out=x)
        grouped_gemm.linear(hidden(x), w2[experts], b2[experts], sizes, out=outputs[portion])
        start = portion.stop
    outputs[start:] = 0
    return outputs


def _portions(sizes: Sequence[int], at_most: int) -> Iterator[tuple[slice, list[int]]]:
    """Cut all rows into portions of `at_most`: (the experts with rows in this portion, the number of rows of each)."""
    first, room = 0, at_most
    portion: list[int] = []
    for expert, size in enumerate(sizes):
        while size > room:
            yield slice(first, expert + 1), [*portion, room]
            size -= room
            first, portion, room = expert, [], at_most
        portion.append(size)
        room -= size
    yield slice(first, len(sizes)), portion


def _padded(
    rows: Tensor, counts: Tensor, capacity: int, hidden: Callable[[Tensor], Tensor], weights: Weights
) -> Tensor:
    """One batched product over `[E, capacity, D]`; no shape depends on a value, so CUDA graphs can capture it."""
    w1, b1, w2, b2 = weights
    E, N = counts.shape[0], rows.shape[0]
    end = counts.cumsum(0)
    index = torch.arange(N, device=rows.device)
    expert = torch.bucketize(index, end, right=True)
    slot = index - F.pad(end, (1, 0))[expert]
    # Rows that belong to no expert share one spare slot after the last expert's.
    place = (expert * capacity + slot).where(expert < E, E * capacity)
    slots = rows.new_zeros(E * capacity + 1, rows.shape[1]).index_copy(0, place, rows)
    x = slots[:-1].unflatten(0, (E, capacity))
    y = torch.baddbmm(b2[:, None], hidden(torch.baddbmm(b1[:, None], x, w1.mT)), w2.mT)
    y = F.pad(y.flatten(0, 1), (0, 0, 0, 1))
    return y.index_select(0, place)


def _grouped_mm(rows: Tensor, counts: Tensor, hidden: Callable[[Tensor], Tensor], weights: Weights) -> Tensor:
    """PyTorch's grouped product: offsets stay on the device, so the CPU never waits for it."""
    w1, b1, w2, b2 = weights
    end = counts.cumsum(0).to(torch.int32)
    index = torch.arange(rows.shape[0], device=rows.device)[:, None]
    owner = (index < end) & (index >= end - counts)  # [N, E]
    real = owner.any(dim=1, keepdim=True)
    # Biases are added by a product, too: the gradient of `b1[expert]` would add up thousands of rows one by one.
    owner = owner.to(rows.dtype)
    # The grouped product leaves rows that belong to no expert unwritten, in its output and in the gradient of its
    # input: each `where` replaces them by zeros, in both directions.
    x = F.grouped_mm(rows.where(real, 0), w1.mT, offs=end).addmm_(owner, b1)
    y = F.grouped_mm(hidden(x.where(real, 0)), w2.mT, offs=end).addmm_(owner, b2)
    return y.where(real, 0)


def _grouped(
    rows: Tensor,
    counts: Tensor,
    hidden: Callable[[Tensor], Tensor],
    weights: Weights,
    pages: GradientPages,
) -> Tensor:
    """`_loop` with its own backward pass, see `GroupedLinear`."""
    w1, b1, w2, b2 = weights
    sizes = counts.tolist()
    return GroupedLinear.apply(hidden(GroupedLinear.apply(rows, w1, b1, sizes, pages)), w2, b2, sizes, pages)


class GroupedLinear(torch.autograd.Function):
    """`y[n] = x[n] @ weight[e]^T + bias[e]` for the rows n of each expert e.

    Indexing a stacked weight once per expert makes autograd build and add up one full-size `[E, out, in]` gradient per
    expert; here every expert writes its own slice of a single gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], pages: GradientPages
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes, ctx.pages = sizes, pages
        return grouped_gemm.linear(x, weight, bias, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_y = grad_y.contiguous()
        grad_x = grad_weight = grad_bias = None
        if need_x:
            grad_x = grouped_gemm.grad_input(grad_y, weight, ctx.sizes)
        if need_weight:
            grad_weight = grouped_gemm.grad_weight(grad_y, x, ctx.sizes, out=ctx.pages.empty_like(weight))
        if need_bias:
            grad_bias = grouped_gemm.grad_bias(grad_y, ctx.sizes)
        return grad_x, grad_weight, grad_bias, None, None
