"""The values that every contender must approximate: a plain loop over the experts in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_edu.analysis.parity import relative_difference
from moe_edu.bench.contenders import Contender
from moe_edu.moe.layer import SparseMLP
from moe_edu.moe.routing import RouterOutput


def exact_step(layer: SparseMLP, hidden: Tensor, routing: RouterOutput, upstream: Tensor) -> list[Tensor]:
    """One forward and backward pass of `layer` in float64, with the choices of `routing`.

    Args:
        layer: gates normalised after dropping, no dropout, no expert output masking.
        hidden, upstream: `[1, T, D]`, the input and the gradient of the output.

    Returns:
        `[1, T, D]` output, then the gradients of hidden and of `Contender.probes`.
    """
    weights = (layer.experts.w1, layer.experts.b1, layer.experts.w2, layer.experts.b2)
    leaves = [t.detach().double().requires_grad_() for t in (hidden, layer.router.classifier.weight)]
    leaves += [weight[0].detach().double().requires_grad_() for weight in weights]
    x, classifier = leaves[0][0], leaves[1]

    index = routing.expert_index.clamp(min=0)
    survivors = (x @ classifier.T).gather(1, index).masked_fill(~routing.kept, torch.finfo(x.dtype).min)
    gates = torch.softmax(survivors, dim=1) * routing.kept  # [T, K]

    def expert(rows: Tensor, e: int) -> Tensor:
        w1, b1, w2, b2 = leaves[2:] if e == 0 else (weight[e].detach().double() for weight in weights)
        return F.linear(layer.experts.act(F.linear(rows, w1, b1)), w2, b2)

    output = torch.zeros_like(x)
    for e in range(routing.num_experts):
        token, choice = ((routing.expert_index == e) & routing.kept).nonzero(as_tuple=True)
        # Checkpointed, so that only one expert's float64 weights are in memory at a time.
        rows = checkpoint(expert, x[token], e, use_reentrant=False)
        output = output.index_add(0, token, gates[token, choice, None] * rows)
    gradients = torch.autograd.grad(output, leaves, upstream[0].double())
    return [output.detach()[None], *gradients]


def forward_error(contender: Contender, hidden: Tensor, exact: list[Tensor]) -> float:
    """How far the output of a pass without gradients is from `exact_step`, see `relative_error`."""
    with torch.no_grad():
        return relative_error(contender.forward(hidden), exact[0])


def gradient_error(contender: Contender, hidden: Tensor, upstream: Tensor, exact: list[Tensor]) -> float:
    """How far a training step is from `exact_step`: the largest `relative_error` of its output and gradients."""
    hidden = hidden.detach().clone().requires_grad_()
    contender.module.zero_grad(set_to_none=True)
    output = contender.forward(hidden)
    output.backward(upstream)
    assert hidden.grad is not None
    actual = [output.detach(), hidden.grad, *contender.probes()]
    return max(relative_error(a, b) for a, b in zip(actual, exact, strict=True) if a is not None)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the deviation over the norm of the exact value.

    Not the largest deviation: a pre-activation within rounding error of zero may fall on either side of ReLU's kink,
    which changes one token's part of a few gradients and is not the contender's fault.
    """
    return relative_difference(actual.double(), exact, order=2)
