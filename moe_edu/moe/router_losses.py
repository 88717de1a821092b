"""The two losses of a router: load balancing, and the z-loss.

Shapes: T = B*S tokens, E experts, K choices per token.

Everything runs in fp32 (fp64 for fp64 inputs), whatever the model's dtype, and nothing here waits for the device.
Sources: Switch Transformer (Fedus et al. 2021), ST-MoE (Zoph et al. 2022), and `architectures/moe/routing.py` of
flaxformer.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moe_edu.moe.routing import check_padding_mask, count_per_expert

Choices = Literal["first", "all"]


def load_balancing_loss(
    probs: Tensor, expert_index: Tensor, padding: Tensor | None = None, choices: Choices = "first"
) -> Tensor:
    """`E * sum_e f_e * P_e`: 1 when choices and probabilities are even, E when one expert takes every token.

    `f_e` is the share of real tokens that chose expert e, before capacity drops any; `P_e` is the mean
    probability of e over real tokens. A count has no gradient, so the gradient flows through P alone.
    Source: Switch Transformer, equations 4 to 6.

    Args:
        probs: `[T, E]`, the router's softmax.
        expert_index: `[T, K]` integers, best choice first; -1 marks a choice not made and is never counted.
        padding: `[T]` bool, True where padded: such tokens count in neither f nor P.
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
    if expert_index.ndim != 2 or len(expert_index) != num_tokens or not is_integer(expert_index):
        raise ValueError(
            f"expert_index must be integers of shape [T, K] with T={num_tokens} as in probs, "
            f"not {expert_index.dtype} of shape {list(expert_index.shape)}"
        )
    counted = expert_index[:, :1] if choices == "first" else expert_index
    probs = probs.to(loss_dtype(probs))
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
    logits = logits.to(loss_dtype(logits))
    if padding is not None:
        # Masked before the logsumexp, not only after it: a padded row then gets gradient 0 even if it holds inf.
        logits = logits.masked_fill(padding[:, None], 0.0)
    log_z = torch.logsumexp(logits, dim=-1)
    if padding is not None:
        log_z = log_z.masked_fill(padding, 0.0)
    return log_z.square().sum() / count_real_tokens(len(logits), padding)


def count_real_tokens(num_tokens: int, padding: Tensor | None) -> Tensor | int:
    """The tokens that are not padding, but at least 1: the divisor of every mean over real tokens."""
    return max(num_tokens, 1) if padding is None else (~padding).sum().clamp(min=1)


def is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def loss_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_router_tensor(name: str, tensor: Tensor, padding: Tensor | None) -> None:
    if tensor.ndim != 2:
        raise ValueError(
            f"{name} must have the shape [T, E], not {list(tensor.shape)}: flatten [B, S, E] first"
        )
    check_padding_mask(padding, tensor.shape[:1], "padding")
