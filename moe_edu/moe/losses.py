"""The training loss of T5X: weighted cross-entropy, its normalising factors, and the router losses added to it.

Shapes: B batch, S sequence, V vocabulary.

Everything runs in fp32 (fp64 for fp64 inputs), whatever the model's dtype, and nothing here waits for the
device. Sources: `losses.py` and `contrib/moe/models.py` of T5X.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_edu.moe.metrics import ExpertMetrics
from moe_edu.moe.router_losses import is_integer, loss_dtype


class SpecialLossNormalizingFactor(enum.Enum):
    """Normalising factors that depend on the batch (`t5x/losses.py`).

    * `NUM_REAL_TARGET_TOKENS`: the sum of the weights, which is the number of real tokens when weights are 0 or 1.
    * `NUM_TOTAL_TARGET_TOKENS`: B*S, padding included.
    * `AVERAGE_PER_SEQUENCE`: the mean over each sequence's own tokens, then the mean over the sequences that
      have any, so that a long sequence counts no more than a short one.
    """

    NUM_REAL_TARGET_TOKENS = 1
    NUM_TOTAL_TARGET_TOKENS = 2
    AVERAGE_PER_SEQUENCE = 3


LossNormalizingFactor = float | str | SpecialLossNormalizingFactor | None


class CrossEntropy(NamedTuple):
    """What `weighted_cross_entropy` returns; three scalars.

    `total` includes `z_loss`; both are divided by the normalising factor. `weight_sum` is the sum of the
    weights as applied, so under `AVERAGE_PER_SEQUENCE` it is the number of sequences with at least one real token.
    """

    total: Tensor
    z_loss: Tensor
    weight_sum: Tensor


class MoELoss(NamedTuple):
    """What `moe_loss` returns; eight scalars.

    `total = cross_entropy + z_loss + weighted_load_balancing_loss + weighted_router_z_loss`. Each weighted
    router term is a coefficient times its raw term, `load_balancing_loss` or `router_z_loss`, which is a mean
    over the sparse layers. `weight_sum` is the sum of the tokens' weights.
    """

    total: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    weighted_load_balancing_loss: Tensor
    weighted_router_z_loss: Tensor
    load_balancing_loss: Tensor
    router_z_loss: Tensor
    weight_sum: Tensor


def weighted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: LossNormalizingFactor = None,
    segment_ids: Tensor | None = None,
) -> CrossEntropy:
    """Cross-entropy as T5X computes it, in nats: smoothed, with a z term, weighted, normalised, summed.

    The soft target puts `1 - label_smoothing` on the target and shares the rest among the other V-1 classes;
    its own entropy is subtracted, so that a perfect prediction scores 0. `z_loss * logsumexp(logits)^2` is
    added for every token. Source: `compute_weighted_cross_entropy` in `t5x/losses.py`, except that T5X applies
    the default weights only under a special normalising factor; here they always apply.

    Args:
        logits: `[B, S, V]`.
        targets: `[B, S]` integers in `[0, V)`.
        weights: `[B, S]`, not negative; None means `targets > 0`, since T5X pads with 0. If another id is the
            padding, such as 1 in NLLB, pass the weights.
        label_smoothing: in `[0, 1)`.
        z_loss: coefficient of the z term, 0 or more.
        loss_normalizing_factor: None (plain sum), a number above 0, a `SpecialLossNormalizingFactor`, or the
            name of one in upper or lower case.
        segment_ids: `[B, S]` integers, for sequences packed into one row: a run of equal ids is one sequence,
            0 is padding. Only `AVERAGE_PER_SEQUENCE` reads it.

    Returns:
        `CrossEntropy(total, z_loss, weight_sum)`. Without real tokens all are 0, not NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of its range, or an unknown factor.
    """
    factor = _parse_normalizing_factor(loss_normalizing_factor)
    _check_cross_entropy(logits, targets, label_smoothing, z_loss)
    _check_same_shape("weights", weights, targets)
    _check_same_shape("segment_ids", segment_ids, targets)

    log_probs = F.log_softmax(logits, dim=-1, dtype=loss_dtype(logits))
    losses = _smoothed_cross_entropy(log_probs, targets.long(), label_smoothing)
    weights = (targets > 0 if weights is None else weights).to(losses.dtype)
    weights, divisor = _normalize(weights, factor, segment_ids)
    total = (losses * weights).sum() / divisor
    total_z_loss = torch.zeros_like(total)
    if z_loss:
        log_z = torch.logsumexp(logits.to(losses.dtype), dim=-1)
        total_z_loss = z_loss * (log_z.square() * weights).sum() / divisor
    return CrossEntropy(total + total_z_loss, total_z_loss, weights.sum())


def moe_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    expert_metrics: Sequence[ExpertMetrics],
    router_aux_loss_coef: float = 0.01,
    router_z_loss_coef: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: LossNormalizingFactor = None,
    segment_ids: Tensor | None = None,
) -> MoELoss:
    """The training loss: cross-entropy plus the two router losses, each averaged over the sparse layers.

    The router losses are means already, so the normalising factor does not divide them. Source:
    `_moe_loss_fn` in `t5x/contrib/moe/models.py`.

    Args:
        expert_metrics: one `ExpertMetrics` per sparse layer, as `collect_metrics` returns them.
        router_aux_loss_coef: weight of the load balancing loss; the released NLLB-MoE trained with 0.01.
        router_z_loss_coef: weight of the router z-loss.
        logits, targets, weights, label_smoothing, z_loss, loss_normalizing_factor, segment_ids: as in
            `weighted_cross_entropy`.

    Returns:
        The total to differentiate, and its parts.

    Raises:
        ValueError: as `weighted_cross_entropy`; a coefficient below 0; a coefficient above 0 although
            there is no sparse layer to take the loss from.
    """
    _check_not_negative("router_aux_loss_coef", router_aux_loss_coef)
    _check_not_negative("router_z_loss_coef", router_z_loss_coef)
    if not expert_metrics and (router_aux_loss_coef or router_z_loss_coef):
        raise ValueError(
            f"router_aux_loss_coef={router_aux_loss_coef} and router_z_loss_coef={router_z_loss_coef} ask for "
            "router losses, but expert_metrics is empty: no sparse layer ran. Set both to 0, or give "
            "the model sparse layers (encoder_sparse_step or decoder_sparse_step above 0)"
        )
    total, total_z_loss, weight_sum = weighted_cross_entropy(
        logits, targets, weights, label_smoothing, z_loss, loss_normalizing_factor, segment_ids
    )
    balance = router_z = torch.zeros_like(total)
    if expert_metrics:
        balance = torch.stack([layer.auxiliary_loss for layer in expert_metrics]).mean()
        router_z = torch.stack([layer.router_z_loss for layer in expert_metrics]).mean()
    weighted_balance = router_aux_loss_coef * balance
    weighted_router_z = router_z_loss_coef * router_z
    return MoELoss(
        total=total + weighted_balance + weighted_router_z,
        cross_entropy=total - total_z_loss,
        z_loss=total_z_loss,
        weighted_load_balancing_loss=weighted_balance,
        weighted_router_z_loss=weighted_router_z,
        load_balancing_loss=balance,
        router_z_loss=router_z,
        weight_sum=weight_sum,
    )


def summarize_metrics(
    expert_metrics: Sequence[ExpertMetrics], loss: MoELoss, *, num_target_tokens: int
) -> dict[str, Tensor]:
    """The numbers T5X logs for one step, as detached scalars.

    Args:
        expert_metrics: the layers that `loss` was computed from.
        loss: what `moe_loss` returned.
        num_target_tokens: B*S of the targets, padding included.

    Returns:
        `cross_ent_loss` (the total minus the z and router terms), `cross_ent_loss_per_all_target_tokens`, and
        one `experts/<name>` for each field of `ExpertMetrics`: the mean over layers, with the two losses already
        multiplied by their coefficients. Without sparse layers there are no `experts/` keys.

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


def _smoothed_cross_entropy(log_probs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy `[B, S]` against the soft target, minus the soft target's entropy.

    `confidence * nll + low * (sum over the others)` needs no `[B, S, V]` soft target.
    """
    nll = -log_probs.gather(-1, targets[..., None]).squeeze(-1)
    if not label_smoothing:  # also avoids 0 * inf where a class is masked with -inf
        return nll
    num_others = log_probs.shape[-1] - 1
    confidence, low = 1.0 - label_smoothing, label_smoothing / num_others
    entropy = -(confidence * math.log(confidence) + num_others * low * math.log(low + 1e-20))
    return (confidence - low) * nll - low * log_probs.sum(dim=-1) - entropy


def _normalize(
    weights: Tensor, factor: float | SpecialLossNormalizingFactor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor | float]:
    """The weights to apply and the number to divide by, which is never 0."""
    match factor:
        case None:
            return weights, 1.0
        case SpecialLossNormalizingFactor.NUM_REAL_TARGET_TOKENS:
            weight_sum = weights.sum()
            return weights, weight_sum.masked_fill(weight_sum == 0, 1.0)
        case SpecialLossNormalizingFactor.NUM_TOTAL_TARGET_TOKENS:
            return weights, max(weights.numel(), 1)
        case SpecialLossNormalizingFactor.AVERAGE_PER_SEQUENCE:
            return _average_per_sequence(weights, segment_ids)
        case _:
            return weights, factor


def _average_per_sequence(weights: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights `[B, S]` scaled to sum to 1 in each sequence, and the number of sequences with any weight."""
    if segment_ids is None:
        sums = sums_at_position = weights.sum(dim=-1, keepdim=True)
    else:
        weights = weights.masked_fill(segment_ids == 0, 0.0)
        # Numbering the runs 0, 1, ... bounds their indices by S, whatever the ids are, without waiting for the device.
        starts = segment_ids[..., 1:] != segment_ids[..., :-1]
        run_index = F.pad(starts.long().cumsum(dim=-1), (1, 0))[..., : segment_ids.shape[-1]]
        sums = torch.zeros_like(weights).scatter_add(-1, run_index, weights)
        sums_at_position = sums.gather(-1, run_index)
    return weights / sums_at_position.masked_fill(sums_at_position == 0, 1.0), (sums != 0).sum().clamp(min=1)


def _parse_normalizing_factor(factor: LossNormalizingFactor) -> float | SpecialLossNormalizingFactor | None:
    if factor is None or isinstance(factor, SpecialLossNormalizingFactor):
        return factor
    names = SpecialLossNormalizingFactor.__members__
    if isinstance(factor, str) and factor.upper() in names:
        return names[factor.upper()]
    if isinstance(factor, int | float) and not isinstance(factor, bool) and 0 < factor < math.inf:
        return factor
    raise ValueError(
        f"loss_normalizing_factor must be None, a finite number above 0 or one of {', '.join(names)}, "
        f"not {factor!r}"
    )


def _check_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> None:
    if logits.ndim != targets.ndim + 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits must have the shape of targets plus one dimension of classes, but logits have "
            f"{list(logits.shape)} and targets {list(targets.shape)}"
        )
    if not is_integer(targets):
        raise ValueError(f"targets must be class indices of an integer dtype, not {targets.dtype}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, not {label_smoothing}")
    if label_smoothing and logits.shape[-1] < 2:
        raise ValueError("label_smoothing shares its mass among the other classes, and logits have only one")
    _check_not_negative("z_loss", z_loss)


def _check_same_shape(name: str, tensor: Tensor | None, targets: Tensor) -> None:
    if tensor is not None and tensor.shape != targets.shape:
        raise ValueError(
            f"{name} must have the shape of targets, {list(targets.shape)}, not {list(tensor.shape)}"
        )


def _check_not_negative(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, not {value}")
