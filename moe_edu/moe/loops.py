"""The sparse layer as loops, slow and obvious: one token, one choice, one expert at a time.

Tests compare `routing`, `dispatch` and `experts` with these loops, in the forward pass and in every gradient. The loops
compute in the dtype of their inputs: in float64 they give the values that the fast code has to approximate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_edu.config import SecondExpertPolicy
from moe_edu.moe.experts import Experts
from moe_edu.moe.routing import RouterOutput


def loop_gating(
    logits: Tensor,
    *,
    capacity: int,
    second_expert_policy: SecondExpertPolicy = "all",
    normalize_before_dropping: bool = False,
    batch_prioritized: bool = False,
    padding: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RouterOutput:
    """`top2_gating` as you would explain it: the same arguments, the same result, the same random draws."""
    T, E = logits.shape
    probs = torch.softmax(logits, dim=-1)
    p = probs.tolist()
    padded = [False] * T if padding is None else padding.tolist()

    # 1. Each token names the expert it likes best, and the best of the others.
    scores = logits.detach()
    if second_expert_policy == "sampling":
        scores = scores - torch.empty_like(scores).exponential_(generator=generator).log()  # Gumbel(0, 1)
    score = scores.tolist()
    favourites = []
    for t in range(T):
        first = max(range(E), key=lambda e: p[t][e])
        others = [e for e in range(E) if e != first]
        favourites.append([first, *sorted(others, key=lambda e: -score[t][e])[:1]])

    # 2. Padding chooses no expert; policy "random" gives up an unlikely second choice.
    uniform = None
    if second_expert_policy == "random":
        uniform = torch.rand(T, generator=generator, device=logits.device, dtype=logits.dtype).tolist()
    chosen: list[dict[int, int]] = []  # one dictionary per token: choice number -> expert
    for t in range(T):
        choices = {} if padded[t] else dict(enumerate(favourites[t]))
        if uniform is not None and 1 in choices and not 2 * p[t][choices[1]] > uniform[t]:
            del choices[1]
        chosen.append(choices)

    # 3. The tokens queue up: all first choices, then all second choices.
    queue = list(range(T))
    if batch_prioritized:
        queue.sort(key=lambda t: -max(p[t]))
    next_place = [0] * E
    expert_index = torch.full((T, 2), -1, device=logits.device)
    position = torch.full((T, 2), -1, device=logits.device)
    for k in (0, 1):
        for t in queue:
            if k in chosen[t]:
                expert = chosen[t][k]
                expert_index[t, k] = expert
                position[t, k] = next_place[expert]
                next_place[expert] += 1
    kept = (position >= 0) & (position < capacity)

    # 4. The experts that took a token share it.
    weights = torch.zeros(T, 2, dtype=logits.dtype, device=logits.device)
    for t in range(T):
        took = [k for k in chosen[t] if kept[t, k]]
        if normalize_before_dropping:
            total = probs[t, favourites[t]].sum()
            for k in took:
                weights[t, k] = probs[t, chosen[t][k]] / total
        elif took:
            weights[t, took] = torch.softmax(logits[t, [chosen[t][k] for k in took]], dim=0)
    return RouterOutput(logits, probs, expert_index, weights, position, kept, capacity, padding)


def loop_sparse_mlp(hidden: Tensor, routing: RouterOutput, experts: Experts) -> Tensor:
    """The experts' weighted outputs for `hidden [T, D]`, without dropout and expert output masking: `[T, D]`."""
    outputs = torch.zeros_like(hidden)
    for t in range(routing.num_tokens):
        for k in (0, 1):
            if routing.kept[t, k]:
                e = routing.expert_index[t, k]
                inner = experts.act(experts.w1[e] @ hidden[t] + experts.b1[e])
                output = experts.w2[e] @ inner + experts.b2[e]
                outputs[t] = outputs[t] + routing.combine_weights[t, k] * output
    return outputs
