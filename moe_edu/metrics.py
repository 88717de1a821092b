"""What the routers did in one pass: five numbers a sparse layer, and their summary over the model.

Letters: B batch, S sequence, T = B*S tokens, E experts, K choices a token, C capacity of one expert.

Sources: `flaxformer/architectures/moe/moe_layers.py` (what each number is) and `t5x/contrib/moe/models.py`
(`_expert_metrics`, the summary). Every value stays a tensor on its device, so a training step that collects
metrics waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_edu.losses import Choices, MoELoss, count_real_tokens, load_balancing_loss, router_z_loss
from moe_edu.routing import RouterOutput


class ExpertMetrics(NamedTuple):
    """The router statistics of one sparse layer; five scalars, all 0 when there is no real token.

    Attributes:
        auxiliary_loss: `load_balancing_loss`, unweighted, with gradient.
        router_z_loss: `router_z_loss`, unweighted, with gradient.
        fraction_tokens_left_behind: share of the real tokens that no expert took, 0 to 1.
        expert_usage: kept choices over E*C, the places that all experts have together, 0 to 1.
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
        # A choice not made has the index -1, which gather refuses; it is never kept, so any index serves.
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
    """One `ExpertMetrics` for each sparse layer that ran; None (a dense or a dropped layer) is skipped."""
    return tuple(ExpertMetrics.from_routing(layer, choices) for layer in routing if layer is not None)


def summarize_metrics(
    expert_metrics: Sequence[ExpertMetrics], loss: MoELoss, *, num_target_tokens: int
) -> dict[str, Tensor]:
    """The numbers T5X logs for one step, as detached scalars.

    Args:
        expert_metrics: the layers that `loss` was computed from.
        loss: what `moe_loss` returned.
        num_target_tokens: B*S of the targets, pads included.

    Returns:
        `cross_ent_loss` (the total less the z and router terms), `cross_ent_loss_per_all_target_tokens`, and
        one `experts/<name>` for each field of `ExpertMetrics`: the mean over layers, the two losses already
        multiplied by their factors. Without sparse layers there is nothing to average and no `experts/` key.

    Raises:
        ValueError: `num_target_tokens` below 1.
    """
    if num_target_tokens < 1:
        raise ValueError(f"num_target_tokens must be B*S of the targets, at least 1, not {num_target_tokens}")
    cross_ent_loss = loss.cross_entropy.detach()
    summary = {
        "cross_ent_loss": cross_ent_loss,
        "cross_ent_loss_per_all_target_tokens": cross_ent_loss / num_target_tokens,
    }
    if expert_metrics:
        means = ExpertMetrics(*(torch.stack(values).mean() for values in zip(*expert_metrics, strict=True)))
        weighted = means._replace(
            auxiliary_loss=loss.weighted_load_balancing_loss, router_z_loss=loss.weighted_router_z_loss
        )
        summary |= {f"experts/{name}": value.detach() for name, value in weighted._asdict().items()}
    return summary
