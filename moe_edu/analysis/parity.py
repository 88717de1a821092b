"""Do two models with the same weights compute the same? Compares outputs, every gradient, and generated ids.

The strictest mode is training, in which capacity drops choices. Both models draw the same random numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moe_edu.model.translator import MoETranslator
from moe_edu.moe.experts import Experts
from moe_edu.moe.layer import Mask, with_parts
from moe_edu.moe.loops import loop_gating, loop_sparse_mlp
from moe_edu.moe.routing import RouterOutput

OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-4


class Parity(NamedTuple):
    """How far two models differ.

    Attributes:
        output: largest difference of a logit, divided by the largest logit.
        gradient: largest difference of an element of a gradient tensor, divided by the tensor's largest element; the
            worst tensor counts.
        same_ids: whether both generate the same ids.
    """

    output: float
    gradient: float
    same_ids: bool

    @property
    def holds(self) -> bool:
        """Whether both differences are within fp32 rounding and the ids are the same."""
        return self.output <= OUTPUT_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE and self.same_ids


def compare_models(
    model: MoETranslator,
    other: MoETranslator,
    source_ids: Tensor,
    source_mask: Tensor,
    decoder_ids: Tensor,
    *,
    max_new_tokens: int = 24,
) -> Parity:
    """Compare both models in training mode on one batch, then what they generate; each is left in the mode it had.

    Args:
        source_ids: `[B, S]`, padded where `source_mask [B, S]` is 0.
        decoder_ids: `[B, L]`, without padding.
    """
    logits, grads, ids = _run(model, source_ids, source_mask, decoder_ids, max_new_tokens)
    other_logits, other_grads, other_ids = _run(other, source_ids, source_mask, decoder_ids, max_new_tokens)
    # Some gradients, such as that of a key's bias, are zero except for rounding: the largest of all is their scale.
    floor = 1e-3 * max(float(grad.abs().max()) for grad in grads.values())
    return Parity(
        relative_difference(other_logits, logits),
        max(relative_difference(other_grads[name], grad, floor) for name, grad in grads.items()),
        torch.equal(ids, other_ids),
    )


def slow_reference(model: MoETranslator) -> MoETranslator:
    """A copy of `model` whose sparse layers are the loops of `moe_edu.moe.loops`."""
    return with_parts(model, loop_gating, _mix_by_loops)


def _mix_by_loops(hidden: Tensor, routing: RouterOutput, experts: Experts, mask: Mask) -> Tensor:
    # Expert output masking is drawn on the gates, as in the fast code.
    _, gates = mask(hidden, routing.combine_weights)
    return loop_sparse_mlp(hidden, replace(routing, combine_weights=gates), experts)


def relative_difference(
    actual: Tensor, expected: Tensor, floor: float = torch.finfo(torch.float32).tiny, order: float = math.inf
) -> float:
    """The norm of `actual - expected`, divided by the larger of the norm of `expected` and `floor`.

    Args:
        order: order of the vector norm; infinity compares the largest elements, 2 the Euclidean lengths.
    """
    if not expected.numel():
        return 0.0
    difference = torch.linalg.vector_norm(actual.to(expected.dtype) - expected, order)
    return difference.item() / max(torch.linalg.vector_norm(expected, order).item(), floor)


def _run(
    model: MoETranslator, source_ids: Tensor, source_mask: Tensor, decoder_ids: Tensor, max_new_tokens: int
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Logits and gradients in training mode, then the ids of a greedy search."""
    mode = model.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = model.train()(source_ids, source_mask, decoder_ids).logits
    # Any scalar whose gradient reaches every weight will do: here the mean log-probability of the given tokens.
    loss = logits.log_softmax(dim=-1).gather(-1, decoder_ids[..., None]).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    ids = model.eval().generate(source_ids, source_mask, max_new_tokens=max_new_tokens)
    model.train(mode)
    return (
        logits.detach(),
        {
            name: torch.zeros_like(parameter) if grad is None else grad
            for name, parameter, grad in zip(names, parameters, grads, strict=True)
        },
        ids,
    )
