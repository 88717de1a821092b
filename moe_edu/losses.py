"""The losses of T5X: weighted cross-entropy, its normalising factors, and the two router losses.

Letters: B batch, S sequence, V vocabulary, T = B*S tokens, E experts, K choices a token.

Everything runs in fp32 (fp64 for fp64 inputs) whatever the dtype of the model, and nothing here waits for
the device. Sources: `losses.py` and `contrib/moe/models.py` of T5X, `architectures/moe/routing.py` of
flaxformer; for the router losses Switch Transformer (Fedus et al. 2021) and ST-MoE (Zoph et al. 2022).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_edu.routing import count_per_expert

if TYPE_CHECKING:
    from moe_edu.metrics import ExpertMetrics

Choices = Literal["first", "all"]


class SpecialLossNormalizingFactor(enum.Enum):
    """Normalising factors that depend on the batch (`t5x/losses.py`).

    * `NUM_REAL_TARGET_TOKENS`: the sum of the weights, which is the number of words when weights are 0 or 1.
    * `NUM_TOTAL_TARGET_TOKENS`: B*S, pads included.
    * `AVERAGE_PER_SEQUENCE`: each sequence's mean over its own words, then the mean over sequences that have
      any, so that a long sequence counts no more than a short one.
    """

    NUM_REAL_TARGET_TOKENS = 1
    NUM_TOTAL_TARGET_TOKENS = 2
    AVERAGE_PER_SEQUENCE = 3


LossNormalizingFactor = float | str | SpecialLossNormalizingFactor | None


class CrossEntropy(NamedTuple):
    """What `weighted_cross_entropy` returns; three scalars.

    `total` includes `z_loss`; both are divided by the normalising factor. `weight_sum` is the sum of the
    weights as applied, so under `AVERAGE_PER_SEQUENCE` it is the number of sequences that have any word.
    """

    total: Tensor
    z_loss: Tensor
    weight_sum: Tensor


class MoELoss(NamedTuple):
    """What `moe_loss` returns; eight scalars.

    `total = cross_entropy + z_loss + weighted_load_balancing_loss + weighted_router_z_loss`. The weighted
    router terms are their factor times the raw ones, `load_balancing_loss` and `router_z_loss`, which are
    means over the sparse layers.
    """

    total: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    weighted_load_balancing_loss: Tensor
    weighted_router_z_loss: Tensor
    load_balancing_loss: Tensor
    router_z_loss: Tensor
    weight_sum: Tensor


def load_balancing_loss(
    probs: Tensor, expert_index: Tensor, padding: Tensor | None = None, choices: Choices = "first"
) -> Tensor:
    """`E * sum_e f_e * P_e`: 1 when choices and probabilities are even, E when one expert takes all.

    `f_e` is the share of real tokens that chose expert e, before capacity drops any; `P_e` is the mean
    probability of e over real tokens. A count has no gradient, so the gradient flows through P alone.
    Source: Switch Transformer, equations 4 to 6.

    Args:
        probs: `[T, E]`, the router's softmax.
        expert_index: `[T, K]` integers, best choice first; -1 marks a choice not made and is never counted.
        padding: `[T]` bool, True where padded: such tokens enter neither f nor P.
        choices: "first" counts first choices only (Switch); "all" counts all K (flaxformer; K when even).

    Returns:
        A scalar, 0 when there is no real token.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown `choices`.
    """
    if choices not in ("first", "all"):
        raise ValueError(f'choices must be "first" or "all", not {choices!r}')
    _check_router_tensor("probs", probs, padding)
    num_tokens, num_experts = probs.shape
    if expert_index.ndim != 2 or len(expert_index) != num_tokens or not _is_integer(expert_index):
        raise ValueError(
            f"expert_index must be integers of shape [T, K] with T={num_tokens} as in probs, "
            f"not {expert_index.dtype} of shape {list(expert_index.shape)}"
        )
    counted = expert_index[:, :1] if choices == "first" else expert_index
    probs = probs.to(_loss_dtype(probs))
    if padding is not None:
        counted = counted.masked_fill(padding[:, None], -1)
        probs = probs.masked_fill(padding[:, None], 0.0)

    num_real = count_real_tokens(num_tokens, padding)
    f_E = count_per_expert(counted.long(), num_experts) / num_real
    P_E = probs.sum(dim=0) / num_real
    return num_experts * (f_E * P_E).sum()


def router_z_loss(logits: Tensor, padding: Tensor | None = None) -> Tensor:
    """`mean_t logsumexp(logits_t)^2` over real tokens: keeps the router's logits small (ST-MoE, equation 5).

    Args:
        logits: `[T, E]`, before the softmax.
        padding: `[T]` bool, True where padded.

    Returns:
        A scalar, 0 when there is no real token.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check_router_tensor("logits", logits, padding)
    logits = logits.to(_loss_dtype(logits))
    if padding is not None:
        # Before the logsumexp, not only after it: a padded row then gets gradient 0 even where it holds inf.
        logits = logits.masked_fill(padding[:, None], 0.0)
    log_z = torch.logsumexp(logits, dim=-1)
    if padding is not None:
        log_z = log_z.masked_fill(padding, 0.0)
    return log_z.square().sum() / count_real_tokens(len(logits), padding)


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
    added to every token. Source: `compute_weighted_cross_entropy` in `t5x/losses.py`, except that T5X applies
    the default weights only under a special normalising factor; here they always hold.

    Args:
        logits: `[B, S, V]`.
        targets: `[B, S]` integers in `[0, V)`.
        weights: `[B, S]`, not negative; None means `targets > 0`, since T5X pads with 0. Where another id
            pads, as 1 does in NLLB, pass the weights.
        label_smoothing: in `[0, 1)`.
        z_loss: coefficient of the z term, 0 or more.
        loss_normalizing_factor: None (plain sum), a number above 0, or a `SpecialLossNormalizingFactor` or
            its name in any case.
        segment_ids: `[B, S]` integers, for sequences packed into one row: a run of equal ids is one sequence,
            0 is padding. Only `AVERAGE_PER_SEQUENCE` reads it.

    Returns:
        `CrossEntropy(total, z_loss, weight_sum)`. No real token gives 0, not NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of its range, or an unknown factor.
    """
    factor = _parse_normalizing_factor(loss_normalizing_factor)
    _check_cross_entropy(logits, targets, label_smoothing, z_loss)
    _check_same_shape("weights", weights, targets)
    _check_same_shape("segment_ids", segment_ids, targets)

    log_probs = F.log_softmax(logits, dim=-1, dtype=_loss_dtype(logits))
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
    aux_loss_factor: float = 0.01,
    router_z_loss_factor: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: LossNormalizingFactor = None,
    segment_ids: Tensor | None = None,
) -> MoELoss:
    """The training loss: cross-entropy plus the two router losses, each averaged over the sparse layers.

    The router losses are means already, so the normalising factor does not divide them. Source:
    `_moe_loss_fn` in `t5x/contrib/moe/models.py`.

    Args:
        expert_metrics: one `ExpertMetrics` a sparse layer, as `collect_metrics` returns them.
        aux_loss_factor: weight of the load balancing loss; the released NLLB-MoE trained with 0.01.
        router_z_loss_factor: weight of the router z-loss.
        logits, targets, weights, label_smoothing, z_loss, loss_normalizing_factor, segment_ids: as in
            `weighted_cross_entropy`.

    Raises:
        ValueError: as `weighted_cross_entropy`; a router factor below 0; a router factor above 0 although
            there is no sparse layer to take the loss from.
    """
    _check_not_negative("aux_loss_factor", aux_loss_factor)
    _check_not_negative("router_z_loss_factor", router_z_loss_factor)
    if not expert_metrics and (aux_loss_factor or router_z_loss_factor):
        raise ValueError(
            f"aux_loss_factor={aux_loss_factor} and router_z_loss_factor={router_z_loss_factor} ask for "
            "router losses, but expert_metrics is empty: no sparse layer ran. Set both factors to 0, or give "
            "the model sparse layers (encoder_sparse_step or decoder_sparse_step above 0)"
        )
    total, total_z_loss, weight_sum = weighted_cross_entropy(
        logits, targets, weights, label_smoothing, z_loss, loss_normalizing_factor, segment_ids
    )
    balance = router_z = torch.zeros_like(total)
    if expert_metrics:
        balance = torch.stack([layer.auxiliary_loss for layer in expert_metrics]).mean()
        router_z = torch.stack([layer.router_z_loss for layer in expert_metrics]).mean()
    weighted_balance = aux_loss_factor * balance
    weighted_router_z = router_z_loss_factor * router_z
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


def count_real_tokens(num_tokens: int, padding: Tensor | None) -> Tensor | int:
    """The tokens that are not padding, but at least 1: the divisor of every mean over real tokens."""
    return max(num_tokens, 1) if padding is None else (~padding).sum().clamp(min=1)


def _smoothed_cross_entropy(log_probs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy `[B, S]` against the soft target, less the soft target's entropy.

    `confidence * nll + low * (sum over the others)` needs no `[B, S, V]` soft target.
    """
    nll = -log_probs.gather(-1, targets[..., None]).squeeze(-1)
    if not label_smoothing:  # also keeps 0 * inf out where a class is masked with -inf
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
        # Numbering the runs 0, 1, ... bounds them by S, whatever the ids are, without asking the device.
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
    if not _is_integer(targets):
        raise ValueError(f"targets must be class indices of an integer dtype, not {targets.dtype}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, not {label_smoothing}")
    if label_smoothing and logits.shape[-1] < 2:
        raise ValueError("label_smoothing shares its mass among the other classes, and logits have only one")
    _check_not_negative("z_loss", z_loss)


def _check_router_tensor(name: str, tensor: Tensor, padding: Tensor | None) -> None:
    if tensor.ndim != 2:
        raise ValueError(
            f"{name} must have the shape [T, E], not {list(tensor.shape)}: flatten [B, S, E] first"
        )
    if padding is not None and (padding.dtype != torch.bool or padding.shape != tensor.shape[:1]):
        raise ValueError(
            f"padding must be bool of shape [{tensor.shape[0]}], True where padded, "
            f"not {padding.dtype} of shape {list(padding.shape)}"
        )


def _check_same_shape(name: str, tensor: Tensor | None, targets: Tensor) -> None:
    if tensor is not None and tensor.shape != targets.shape:
        raise ValueError(
            f"{name} must have the shape of targets, {list(targets.shape)}, not {list(tensor.shape)}"
        )


def _check_not_negative(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, not {value}")


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _loss_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
