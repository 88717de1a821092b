"""What the routers did in one pass: five numbers per sparse layer.

Shapes: B batch, S sequence, T = B*S tokens, E experts, K choices per token, C capacity of one expert.

Source: `flaxformer/architectures/moe/moe_layers.py`. Every value stays a tensor on its device, so a training step that
collects metrics does not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from moe_edu.moe.router_losses import Choices, count_real_tokens, load_balancing_loss, router_z_loss
from moe_edu.moe.routing import RouterOutput


class ExpertMetrics(NamedTuple):
    """The router statistics of one sparse layer; five scalars, all 0 when there is no real token.

    The names are T5X's, here and in the log, whose `experts/auxiliary_loss` and `experts/router_z_loss` are multiplied
    by `MoEConfig`'s `router_aux_loss_coef` and `router_z_loss_coef`.

    Attributes:
        auxiliary_loss: `load_balancing_loss`, unweighted, with gradient.
        router_z_loss: `router_z_loss`, unweighted, with gradient.
        fraction_tokens_left_behind: share of the real tokens that no expert took, 0 to 1.
        expert_usage: kept choices over E*C, the slots that all experts have together, 0 to 1.
        router_confidence: mean probability, before any normalisation, of the kept choices, 0 to 1.
    """

    auxiliary_loss: Tensor
    router_z_loss: Tensor
    fraction_tokens_left_behind: Tensor
    expert_usage: Tensor
    router_confidence: Tensor

    @classmethod
    def from_routing(cls, routing: RouterOutput, choices: Choices = "first") -> ExpertMetrics:
        """Measure one layer's routing; `choices` as in `load_balancing_loss`."""
        kept, padding = routing.kept, routing.padding
        left_behind = ~kept.any(dim=-1)
        if padding is not None:
            left_behind = left_behind & ~padding
        num_kept = kept.sum()
        # A choice not made has the index -1, which gather refuses; it is never kept, so any valid index will do.
        chosen_probs = routing.probs.detach().gather(-1, routing.expert_index.clamp(min=0))
        return cls(
            auxiliary_loss=load_balancing_loss(routing.probs, routing.expert_index, padding, choices),
            router_z_loss=router_z_loss(routing.logits, padding),
            fraction_tokens_left_behind=left_behind.sum() / count_real_tokens(len(kept), padding),
            expert_usage=num_kept / max(routing.num_experts * routing.capacity, 1),
            router_confidence=chosen_probs.masked_fill(~kept, 0.0).sum() / num_kept.clamp(min=1),
        )


def collect_metrics(
    routing: Iterable[RouterOutput | None], choices: Choices = "first"
) -> tuple[ExpertMetrics, ...]:
    """The metrics of each layer of a model's `routing`, such as `EncoderOutput.routing`.

    Args:
        routing: one entry per layer, None for a dense layer or one that LayerDrop skipped.
        choices: as in `load_balancing_loss`.

    Returns:
        One `ExpertMetrics` for each sparse layer that ran, in order.
    """
    return tuple(ExpertMetrics.from_routing(layer, choices) for layer in routing if layer is not None)
