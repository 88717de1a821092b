"""Do two models of the same weights compute the same? Outputs, every gradient, generated ids.

The strictest mode is training: capacity drops choices there. Both models draw the same random numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_edu.exercises.capstone import rebuild
from moe_edu.model.translator import MoETranslator
from moe_edu.moe.layer import SparseMLP
from moe_edu.moe.loops import loop_gating, loop_sparse_mlp
from moe_edu.moe.routing import RouterOutput, Top2Router, expert_capacity

OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-4


class Parity(NamedTuple):
    """How far two models are apart.

    Attributes:
        output: largest difference of a logit, over the largest logit.
        gradient: largest difference of a gradient's element, over that tensor's largest; the worst tensor counts.
        same_ids: whether both generate the same ids.
    """

    output: float
    gradient: float
    same_ids: bool

    @property
    def holds(self) -> bool:
        """Whether all three are within rounding of fp32."""
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
    """Compare in training mode on one batch, then what both generate; each is left in the mode it had.

    Args:
        source_ids: `[B, S]`, padded where `source_mask [B, S]` is 0.
        decoder_ids: `[B, L]`, without padding.
    """
    logits, grads, ids = _run(model, source_ids, source_mask, decoder_ids, max_new_tokens)
    other_logits, other_grads, other_ids = _run(other, source_ids, source_mask, decoder_ids, max_new_tokens)
    # Some gradients, as that of a key's bias, are zero but for rounding: measured against the largest of all.
    floor = 1e-3 * max(float(grad.abs().max()) for grad in grads.values())
    return Parity(
        _relative(other_logits, logits),
        max(_relative(other_grads[name], grad, floor) for name, grad in grads.items()),
        torch.equal(ids, other_ids),
    )


def slow_reference(model: MoETranslator) -> MoETranslator:
    """A copy of `model` whose sparse layers are the loops of `moe_edu.moe.loops`."""
    return rebuild(model, _ReferenceMLP)


class _ReferenceRouter(Top2Router):
    def __init__(self, router: Top2Router) -> None:
        nn.Module.__init__(self)
        self.config, self.dtype, self.classifier = router.config, router.dtype, router.classifier

    def forward(
        self, hidden: Tensor, padding_mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> RouterOutput:
        config = self.config
        if config.router_ignore_padding_tokens:
            padding_mask = None
        return loop_gating(
            self._logits(hidden.flatten(0, 1)),
            capacity=expert_capacity(hidden.shape[0] * hidden.shape[1], config, self.training),
            second_expert_policy=config.second_expert_policy
            if self.training or config.sample_in_eval
            else "all",
            normalize_before_dropping=config.normalize_router_prob_before_dropping,
            batch_prioritized=config.batch_prioritized_routing,
            padding=None if padding_mask is None else padding_mask.flatten(),
            generator=generator,
        )


class _ReferenceMLP(SparseMLP):
    def __init__(self, layer: SparseMLP) -> None:
        nn.Module.__init__(self)
        self.config, self.experts = layer.config, layer.experts
        self.router = _ReferenceRouter(layer.router)

    def forward(
        self, hidden: Tensor, padding_mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, RouterOutput]:
        routing = self.router(hidden, padding_mask, generator)
        # The masking of expert outputs is drawn as in the fast path, on the gates.
        _, gates = self._mask_outputs(hidden, routing.combine_weights, generator)
        mixed = loop_sparse_mlp(hidden.flatten(0, 1), replace(routing, combine_weights=gates), self.experts)
        return mixed.view(hidden.shape), routing


def _run(
    model: MoETranslator, source_ids: Tensor, source_mask: Tensor, decoder_ids: Tensor, max_new_tokens: int
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Logits and gradients in training mode, then the ids of a greedy search."""
    mode = model.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = model.train()(source_ids, source_mask, decoder_ids).logits
    # Any scalar whose gradient reaches every weight: the mean log-probability of the tokens that were given.
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


def _relative(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    difference = float((actual - expected).abs().max())
    return 0.0 if difference == 0 else difference / max(float(expected.abs().max()), floor)
