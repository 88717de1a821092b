"""Inside the experts: which tokens go where, how much a choice reveals, and what happens without an expert.

Numbers only, no drawing. Shapes: N tokens (padding left out), E experts, K = 2 choices per token, G labels (languages,
scripts, token ids, ...). Information is in bits.

Sources: NLLB Team 2022, section 6 and appendix (experts by language); Miller 1955 (the bias of an estimated
information); Chen et al. 2022 and Koishekenov et al. 2022, arXiv:2212.09811 (pruning the experts of NLLB-MoE).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moe_edu.config import MoEConfig
from moe_edu.moe.layer import SparseMLP
from moe_edu.moe.routing import RouterOutput, count_per_expert, top2_gating

Ablation = Literal["reroute", "silence"]


class Information(NamedTuple):
    """How much the chosen expert reveals about a label.

    Attributes:
        bits: mutual information in the sample. It is above 0 even if expert and label are unrelated.
        chance: the mean of the same number with shuffled labels; compare `bits` with it.
        chance_std: standard deviation over the shuffles.
        entropy: the uncertainty about the label itself, which `bits` cannot exceed.
    """

    bits: float
    chance: float
    chance_std: float
    entropy: float

    @property
    def above_chance(self) -> float:
        return self.bits - self.chance


def load_matrix(labels: Tensor, expert_index: Tensor, num_labels: int, num_experts: int) -> Tensor:
    """Count which experts the tokens of each label chose: `[G, E]` int64.

    Args:
        labels: `[N]` int64 from 0 to G - 1, one per token.
        expert_index: `[N]` or `[N, K]` int64, as in `RouterOutput.expert_index`; pass `expert_index[:, 0]` for the
            first choices only. -1 (padding or no choice) is not counted.

    Raises:
        ValueError: lengths differ, or a label or an expert is out of range.
    """
    _check_labels(labels, expert_index, num_labels)
    if expert_index.numel() and not -1 <= int(expert_index.min()) <= int(expert_index.max()) < num_experts:
        raise ValueError(f"expert_index must lie between -1 and {num_experts - 1}")
    choices = expert_index if expert_index.ndim == 2 else expert_index[:, None]
    cell = labels[:, None] * num_experts + choices
    return count_per_expert(cell.where(choices >= 0, -1), num_labels * num_experts).view(
        num_labels, num_experts
    )


def entropy(counts: Tensor) -> Tensor:
    """Entropy in bits of the distributions given by `counts [..., n]`: `[...]` float64; 0 if all counts are 0."""
    counts = counts.double()
    p = counts / counts.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return -torch.special.xlogy(p, p).sum(dim=-1) / math.log(2)


def mutual_information(counts: Tensor) -> float:
    """Bits that the column reveals about the row, from a table `[G, E]` of counts: `H(row) + H(column) - H(cell)`."""
    rows, columns, cells = entropy(counts.sum(1)), entropy(counts.sum(0)), entropy(counts.flatten())
    return max(float(rows + columns - cells), 0.0)


def miller_madow_bias(counts: Tensor) -> float:
    """Bits by which `mutual_information(counts)` is expected to be too large (Miller 1955) for N independent tokens.

    Tokens of one sentence are not independent: shuffling whole sentences (`measure_information`) is safer.
    """
    rows, columns = (counts.sum(1) > 0).sum(), (counts.sum(0) > 0).sum()
    excess = int((counts > 0).sum() - rows - columns + 1)
    return excess / (2 * math.log(2) * max(int(counts.sum()), 1))


def measure_information(
    labels: Tensor,
    expert: Tensor,
    *,
    sentence: Tensor | None = None,
    given: Tensor | None = None,
    permutations: int = 20,
    seed: int = 0,
) -> Information:
    """How much `expert` reveals about `labels`, compared with what it would seem to reveal if they were unrelated.

    Args:
        labels: `[N]` int64, at least 0.
        expert: `[N]` int64, at least 0.
        sentence: `[N]` int64; the sentence of each token. Chance then shuffles the labels between whole sentences, each
            with one label, so that the similarity of a sentence's tokens is not mistaken for a relation. None shuffles
            single tokens.
        given: `[N]` int64, at least 0; measure the information beyond what this (for example the token id) reveals:
            `I(label; expert | given)`. Chance then shuffles among tokens of equal `given`.
        permutations: how often to shuffle.
        seed: for the shuffling.

    Raises:
        ValueError: lengths differ, no tokens, both `sentence` and `given`, or a sentence with two labels.
    """
    if sentence is not None and given is not None:
        raise ValueError(
            "chance is measured either by whole sentences or within `given`: leave one of them out"
        )
    if len(labels) == 0:
        raise ValueError("no tokens to measure")
    given_or_zero = torch.zeros_like(labels) if given is None else given
    for values in (labels, expert, given_or_zero, labels if sentence is None else sentence):
        if values.shape != labels.shape or int(values.min()) < 0:
            raise ValueError(
                "labels, expert, sentence and given must be [N] of one length, without negative values"
            )
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.tensor(
        [
            _information(_shuffle(labels, sentence, given, generator), expert, given_or_zero)
            for _ in range(permutations)
        ],
        dtype=torch.float64,
    )
    return Information(
        bits=_information(labels, expert, given_or_zero),
        chance=float(shuffled.mean()) if permutations else 0.0,
        chance_std=float(shuffled.std(correction=0)) if permutations else 0.0,
        entropy=_joint_entropy(labels, given_or_zero) - _joint_entropy(given_or_zero),
    )


def _information(labels: Tensor, expert: Tensor, given: Tensor) -> float:
    """`I(labels; expert | given)` from the four entropies."""
    bits = (
        _joint_entropy(labels, given)
        + _joint_entropy(expert, given)
        - _joint_entropy(labels, expert, given)
        - _joint_entropy(given)
    )
    return max(bits, 0.0)


def _joint_entropy(*columns: Tensor) -> float:
    code = torch.zeros_like(columns[0])
    for column in columns:
        code = code * (int(column.max()) + 1) + column
    return float(entropy(code.unique(return_counts=True)[1]))


def _shuffle(
    labels: Tensor, sentence: Tensor | None, given: Tensor | None, generator: torch.Generator
) -> Tensor:
    if sentence is not None:
        _, sentence = sentence.unique(return_inverse=True)
        of_sentence = labels.new_zeros(int(sentence.max()) + 1).index_copy(0, sentence, labels)
        if not torch.equal(of_sentence[sentence], labels):
            raise ValueError(
                "a sentence has tokens of two labels: leave `sentence` out to shuffle single tokens"
            )
        return of_sentence[torch.randperm(len(of_sentence), generator=generator)][sentence]
    order = torch.randperm(len(labels), generator=generator)
    if given is None:
        return labels[order]
    # Sorted by `given` twice, once in order and once in random order: tokens of equal `given` swap places.
    target = given.argsort(stable=True)
    source = order[given[order].argsort(stable=True)]
    return torch.empty_like(labels).index_copy(0, target, labels[source])


def coactivation(expert_index: Tensor, num_experts: int) -> Tensor:
    """How often expert i was the first and expert j the second choice of a token: `[E, E]` int64.

    `expert_index [N, 2]`; tokens with only one choice are not counted.
    """
    first, second = expert_index.unbind(1)
    both = (first >= 0) & (second >= 0)
    return load_matrix(first[both], second[both], num_experts, num_experts)


def coactivation_lift(counts: Tensor) -> Tensor:
    """How much more often than by chance two experts share a token: `[E, E]` float64, 1 for no preference.

    Chance keeps how often each expert is the first and the second choice. An expert is never its own partner, so the
    diagonal is 0 and the others are slightly above 1 on average; pairs that cannot occur are 0.
    """
    counts = counts.double()
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum().clamp(min=1)
    return torch.where(expected > 0, counts / expected.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def rank_by_activity(load: Tensor) -> list[int]:
    """Experts from the most to the least active by `load [E]` (or `[G, E]`, summed); lower numbers first on ties."""
    total = load if load.ndim == 1 else load.sum(0)
    return torch.argsort(total, descending=True, stable=True).tolist()


def mean_by_label(values: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """The mean of `values [N]` (bools or numbers) over the tokens of each label: `[G]` float64, NaN without any."""
    _check_labels(labels, values, num_labels)
    sums = torch.zeros(num_labels, dtype=torch.float64).index_add(0, labels, values.double())
    return sums / count_per_expert(labels, num_labels)


def route_without(routing: RouterOutput, experts: Sequence[int], config: MoEConfig) -> RouterOutput:
    """Route again as if `experts` did not exist: their logits become -inf, and tokens take the best of the others.

    Draws no random numbers: the second choice is the runner-up.

    Raises:
        ValueError: an expert does not exist, or no expert is left.
    """
    removed = _as_mask(experts, routing)
    if bool(removed.all()):
        raise ValueError("at least one expert must remain")
    again = top2_gating(
        routing.logits.masked_fill(removed, -torch.inf),
        capacity=routing.capacity,
        normalize_before_dropping=config.normalize_router_prob_before_dropping,
        batch_prioritized=config.batch_prioritized_routing,
        padding=routing.padding,
    )
    # With a single expert left, the runner-up is a removed expert of weight 0: record no second choice.
    gone = (again.expert_index >= 0) & removed[again.expert_index.clamp(min=0)]
    return replace(
        again,
        expert_index=again.expert_index.masked_fill(gone, -1),
        position=again.position.masked_fill(gone, -1),
        kept=again.kept & ~gone,
    )


def silence(routing: RouterOutput, experts: Sequence[int]) -> RouterOutput:
    """Keep every choice, but drop the output of `experts`: their gates become 0, and the others' stay unchanged.

    Raises:
        ValueError: an expert does not exist.
    """
    removed = _as_mask(experts, routing)
    hit = (routing.expert_index >= 0) & removed[routing.expert_index.clamp(min=0)]
    return replace(
        routing, combine_weights=routing.combine_weights.masked_fill(hit, 0.0), kept=routing.kept & ~hit
    )


@contextmanager
def without_experts(
    layer: SparseMLP, experts: Sequence[int], how: Ablation = "reroute"
) -> Iterator[SparseMLP]:
    """Run `layer` without some experts inside a `with` block; its weights never change, and it is restored afterwards.

    Args:
        layer: a sparse layer, for example `model.encoder.layers[1].ffn`.
        experts: the numbers of the experts to leave out.
        how: "reroute" works like `route_without`, "silence" like `silence`.

    Raises:
        ValueError: `how` is unknown; on the first pass also: an expert does not exist, or none is left.
    """
    if how not in get_args(Ablation):
        raise ValueError(f"how must be one of {', '.join(get_args(Ablation))}; got {how!r}")

    def change(_: Any, __: Any, routing: RouterOutput) -> RouterOutput:
        return (
            route_without(routing, experts, layer.config) if how == "reroute" else silence(routing, experts)
        )

    handle = layer.router.register_forward_hook(change)
    try:
        yield layer
    finally:
        handle.remove()


def _as_mask(experts: Sequence[int], routing: RouterOutput) -> Tensor:
    E = routing.num_experts
    unknown = [expert for expert in experts if not 0 <= expert < E]
    if unknown:
        raise ValueError(f"there is no expert {unknown[0]}: the layer has experts 0 to {E - 1}")
    mask = torch.zeros(E, dtype=torch.bool, device=routing.logits.device)
    mask[list(experts)] = True
    return mask


def _check_labels(labels: Tensor, values: Tensor, num_labels: int) -> None:
    if labels.ndim != 1 or len(labels) != len(values):
        raise ValueError(
            f"labels must be [N], one per token; got {list(labels.shape)} for {list(values.shape)}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
        raise ValueError(f"labels must lie between 0 and {num_labels - 1}")
