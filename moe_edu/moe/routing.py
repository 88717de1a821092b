"""The router: which two experts each token chooses, and which choices find room.

Shapes: T tokens (B * S, batch-major), E experts, K = 2 choices per token, C slots per expert.
Source: GShard (Lepikhin et al. 2020, algorithm 1) as NLLB-MoE runs it (NLLB Team 2022, section 6.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_edu.config import MoEConfig, SecondExpertPolicy


@dataclass(frozen=True, eq=False)
class RouterOutput:
    """What one router decided. Immutable.

    Attributes:
        logits: `[T, E]`, router dtype; raw scores, before any noise.
        probs: `[T, E]`, softmax of `logits`.
        expert_index: `[T, K]` int64; the first and second choice, -1 where the token made no such choice
            (padding, a second choice that policy "random" rejected, a single expert).
        combine_weights: `[T, K]`; the gate of each choice, 0 where it was dropped. Rows sum to 1 or 0 if gates
            are normalised after dropping, to at most 1 if before.
        position: `[T, K]` int64; place in the chosen expert's queue, counted from 0; -1 where there was no
            choice. A choice whose place is `capacity` or more was dropped.
        kept: `[T, K]` bool; the choice was made and found room.
        capacity: C, slots per expert.
        padding: `[T]` bool, True where padded; None if the router saw no padding.
    """

    logits: Tensor
    probs: Tensor
    expert_index: Tensor
    combine_weights: Tensor
    position: Tensor
    kept: Tensor
    capacity: int
    padding: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.logits.shape[0]

    @property
    def num_experts(self) -> int:
        """E, including experts that no token chose."""
        return self.logits.shape[1]

    def combine_matrix(self) -> Tensor:
        """The gates as a dense `[T, E]` matrix: row t holds the weights of the experts' outputs for token t."""
        # A choice that was not made becomes expert 0 with weight 0, which adds nothing.
        index = self.expert_index.clamp(min=0)
        return torch.zeros_like(self.probs).scatter_add(1, index, self.combine_weights)

    def dispatch_mask(self) -> Tensor:
        """GShard's dense dispatch mask `[T, E, C]` bool: whether token t is in slot c of expert e."""
        token, choice = self.kept.nonzero(as_tuple=True)
        mask = self.kept.new_zeros(self.num_tokens, self.num_experts, self.capacity)
        mask[token, self.expert_index[token, choice], self.position[token, choice]] = True
        return mask


def expert_capacity(num_tokens: int, config: MoEConfig, training: bool) -> int:
    """Slots per expert for a batch of `num_tokens` tokens (B * S, padding included).

    Training: `config.expert_capacity` if set, else `2 * ceil(T / E)` times the capacity factor. Eval:
    `ceil(fraction * T)` if `config.moe_eval_capacity_token_fraction` is positive, else as in training.
    Source: fairseq, NLLB branch, `fairseq/modules/moe/top2gate.py`.

    Returns:
        C, the largest number of choices that each expert takes.
    """
    if not training and config.moe_eval_capacity_token_fraction > 0:
        return math.ceil(config.moe_eval_capacity_token_fraction * num_tokens)
    if config.expert_capacity is not None:
        return config.expert_capacity
    return math.ceil(config.expert_capacity_factor * 2 * math.ceil(num_tokens / config.num_experts))


def top2_gating(
    logits: Tensor,
    *,
    capacity: int,
    second_expert_policy: SecondExpertPolicy = "all",
    normalize_before_dropping: bool = False,
    batch_prioritized: bool = False,
    padding: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RouterOutput:
    """Choose two experts per token, and give the choices slots.

    Args:
        logits: `[T, E]` floating; never changed.
        capacity: slots per expert, at least 0.
        second_expert_policy: "all" takes the runner-up; "sampling" adds Gumbel noise to the logits, which
            samples the runner-up from the softmax without the first choice; "random" keeps the runner-up only
            if `2 * p2 > U(0, 1)`. For "random", p2 is the softmax's own probability, as in fairseq and
            `transformers` with their defaults; GShard's algorithm 1 first divides it by `p1 + p2`.
        normalize_before_dropping: gates are `p_i / (p1 + p2)` whatever happens next: the share of a choice
            that is dropped, or rejected by "random", is lost. Otherwise gates are divided by the kept choices'
            sum, so that a lone survivor gets 1.
        batch_prioritized: queue by descending top probability instead of by place in the batch
            (Riquelme et al. 2021).
        padding: `[T]` bool, True where padded. Padding chooses no expert and takes no slot.
        generator: draws the random numbers of "sampling" and "random".

    Returns:
        RouterOutput in the dtype of `logits`.

    Raises:
        ValueError: a wrong shape or dtype, a negative capacity, an unknown policy.
    """
    _check_gating_arguments(logits, capacity, second_expert_policy, padding)
    probs = torch.softmax(logits, dim=-1)
    favourites = _choose(logits, probs, second_expert_policy, generator)
    expert_index = favourites
    if second_expert_policy == "random":
        expert_index = _give_up_unlikely(favourites, probs, generator)
    if padding is not None:
        expert_index = expert_index.masked_fill(padding[:, None], -1)

    order = None
    if batch_prioritized:
        order = torch.argsort(probs.amax(dim=1), descending=True, stable=True)
    position = queue_positions(expert_index, logits.shape[1], order)
    kept = (expert_index >= 0) & (position < capacity)

    if normalize_before_dropping:
        choice_probs = probs.gather(1, favourites.clamp(min=0)) * (favourites >= 0)  # [T, K]
        total = choice_probs.sum(dim=1, keepdim=True).clamp(min=torch.finfo(probs.dtype).eps)
        weights = choice_probs * kept / total
    else:
        # p_i over the kept choices' sum, as a softmax: exact even where a lone survivor's p_i underflows.
        choice_logits = logits.gather(1, expert_index.clamp(min=0))
        survivors = choice_logits.masked_fill(~kept, torch.finfo(logits.dtype).min)
        weights = torch.softmax(survivors, dim=1) * kept
    return RouterOutput(
        logits=logits,
        probs=probs,
        expert_index=expert_index,
        combine_weights=weights,
        position=position,
        kept=kept,
        capacity=capacity,
        padding=padding,
    )


def queue_positions(expert_index: Tensor, num_experts: int, order: Tensor | None = None) -> Tensor:
    """Each choice's place in its expert's queue.

    All first choices queue before any second choice: second choices come after *all* first choices, even after
    those that will find no room.

    Args:
        expert_index: `[T, K]` int64, -1 where no choice was made.
        num_experts: E.
        order: `[T]` int64, the tokens in queueing order; None for the order of the batch.

    Returns:
        `[T, K]` int64, -1 where no choice was made.
    """
    T, K = expert_index.shape
    queue = expert_index if order is None else expert_index[order]
    line = queue.T.reshape(-1)  # [K * T]: first choices, then second choices
    # A stable sort by expert puts each queue together, in order of arrival. Choices that were not made form
    # their own queue, after the last expert's.
    expert, arrival = line.where(line >= 0, num_experts).sort(stable=True)
    lengths = count_per_expert(line, num_experts)
    start = F.pad(lengths.cumsum(0), (1, 0))  # [E + 1]
    place = torch.arange(K * T, device=line.device) - start[expert]
    place = torch.empty_like(place).scatter_(0, arrival, place.where(expert < num_experts, -1))
    place = place.reshape(K, T).T
    if order is None:
        return place
    return torch.empty_like(place).index_copy_(0, order, place)


def count_per_expert(expert_index: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in `expert_index` (any shape; -1 is not counted): `[E]` int64.

    `torch.bincount` would wait for the device to learn the size of its result.
    """
    flat = expert_index.reshape(-1)
    counts = flat.new_zeros(num_experts + 1)
    return counts.scatter_add_(0, flat.where(flat >= 0, num_experts), torch.ones_like(flat))[:num_experts]


Gating = Callable[..., RouterOutput]


class Top2Router(nn.Module):
    """The router of one sparse layer: a linear map from hidden states to expert logits, then `gating`.

    The state dict holds `classifier.weight [E, D]` (and `classifier.bias [E]` if `config.router_bias`), as in
    `transformers`' `NllbMoeTop2Router`.

    Attributes:
        gating: `top2_gating`, or a function with the same arguments and result; see `moe_edu.moe.layer.with_parts`.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gating: Gating = top2_gating
        dtype = getattr(torch, config.router_dtype)
        self.classifier = RouterLinear(config.d_model, config.num_experts, config.router_bias, dtype)

    def forward(
        self, hidden: Tensor, padding_mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> RouterOutput:
        """Route `hidden [B, S, D]`; `padding_mask [B, S]` bool, True where padded.

        Raises:
            ValueError: `hidden` is not `[B, S, D]`, or the mask has another shape or dtype.
        """
        if hidden.ndim != 3 or hidden.shape[-1] != self.config.d_model:
            raise ValueError(f"hidden must be [B, S, {self.config.d_model}]; got {list(hidden.shape)}")
        check_padding_mask(padding_mask, hidden.shape[:2])
        config = self.config
        T = hidden.shape[0] * hidden.shape[1]
        policy = config.second_expert_policy
        if not (self.training or config.sample_in_eval):
            policy = "all"
        if config.router_ignore_padding_tokens:
            padding_mask = None
        return self.gating(
            self.classifier(hidden.flatten(0, 1)),
            capacity=expert_capacity(T, config, self.training),
            second_expert_policy=policy,
            normalize_before_dropping=config.normalize_router_prob_before_dropping,
            batch_prioritized=config.batch_prioritized_routing,
            padding=None if padding_mask is None else padding_mask.flatten(),
            generator=generator,
        )


class RouterLinear(nn.Linear):
    """`nn.Linear` that computes and returns `compute_dtype`, whatever the dtypes of its weights and of its input.

    The weights keep the model's dtype. Forward hooks and pruning treat it as any linear layer; dynamic quantisation,
    which looks for the exact class, leaves it alone, so that the router keeps its precision.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, compute_dtype: torch.dtype) -> None:
        super().__init__(inputs, outputs, bias)
        self.compute_dtype = compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        # Autocast would run the product in half precision, even for fp32 operands.
        with torch.autocast(input.device.type, enabled=False):
            operands = (input, self.weight, self.bias)
            return F.linear(*(None if t is None else t.to(self.compute_dtype) for t in operands))


def check_padding_mask(
    padding_mask: Tensor | None, shape: tuple[int, ...] | torch.Size, name: str = "padding_mask"
) -> None:
    """Refuse a mask that could be read the wrong way round; `name` is what the caller calls it.

    Raises:
        ValueError: `padding_mask` is neither None nor a bool tensor of `shape`.
    """
    if padding_mask is None:
        return
    if padding_mask.dtype != torch.bool:
        raise ValueError(
            f"{name} must be bool, True where padded; got {padding_mask.dtype}. "
            "From an attention mask (1 for words) make it with `attention_mask == 0`."
        )
    if padding_mask.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {list(shape)}; got {list(padding_mask.shape)}")


def _check_gating_arguments(logits: Tensor, capacity: int, policy: str, padding: Tensor | None) -> None:
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] < 1:
        raise ValueError(f"logits must be floating [T, E]; got {logits.dtype} {list(logits.shape)}")
    if capacity < 0:
        raise ValueError(f"capacity must be at least 0; got {capacity}")
    if policy not in ("all", "sampling", "random"):
        raise ValueError(f"second_expert_policy must be all, sampling or random; got {policy!r}")
    check_padding_mask(padding, logits.shape[:1], "padding")


def _choose(
    logits: Tensor, probs: Tensor, policy: SecondExpertPolicy, generator: torch.Generator | None
) -> Tensor:
    """`[T, 2]` int64: the first choice, and the best other expert (-1 where there is none).

    The first choice is taken from the probabilities and the second from the logits, as in the code that trained the
    published model. This matters: the softmax rounds, so different logits may have the same probability, and ties go
    to the lower index; if the first choice is almost certain, all other probabilities underflow to 0 and look alike.
    Noise, too, is added to the logits.
    """
    first = probs.argmax(dim=1, keepdim=True)
    if logits.shape[1] == 1:
        return torch.cat([first, torch.full_like(first, -1)], dim=1)
    scores = logits.detach()
    if policy == "sampling":
        scores = scores + _gumbel_like(scores, generator)
    second = scores.scatter(1, first, -torch.inf).argmax(dim=1, keepdim=True)
    # Where every other logit is -inf, argmax falls back to index 0, which may be the first choice again.
    second = second.where(second != first, (first + 1) % logits.shape[1])
    return torch.cat([first, second], dim=1)


def _give_up_unlikely(expert_index: Tensor, probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Keep a second choice of probability p2 only if `2 * p2 > U(0, 1)`.

    As fairseq and `transformers` do by default, p2 is not normalised; GShard's algorithm 1 uses `p2 / (p1 + p2)`.
    """
    first, second = expert_index.split(1, dim=1)
    p2 = probs.detach().gather(1, second.clamp(min=0))
    # Not `torch.rand`, which torch.compile cannot trace with a generator argument where T is not fixed.
    uniform = torch.empty_like(p2).uniform_(generator=generator)
    return torch.cat([first, second.where(2 * p2 > uniform, -1)], dim=1)


def _gumbel_like(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gumbel(0, 1) noise: minus the logarithm of an exponential random number."""
    noise = torch.empty_like(scores).exponential_(generator=generator)
    return -noise.log()
