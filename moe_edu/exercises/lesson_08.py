"""Exercises of lesson 08, look inside the experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_edu.exercises.exercise import Exercise, Mistake


def load_matrix(labels: Tensor, experts: Tensor, num_labels: int, num_experts: int) -> Tensor:
    """labels [N], experts [N] -> counts [G, E] int64: how many tokens of each label chose each expert."""
    cells = labels * num_experts + experts
    return torch.bincount(cells, minlength=num_labels * num_experts).view(num_labels, num_experts)


def _draw_choices(generator: torch.Generator) -> tuple[Tensor, Tensor, int, int]:
    G, E = torch.randint(2, 6, (2,), generator=generator).tolist()
    E += G  # so that the two sizes cannot be confused
    N = int(torch.randint(30, 60, (1,), generator=generator))
    labels = torch.randint(G, (N,), generator=generator)
    return labels, torch.randint(E, (N,), generator=generator), G, E


def _counts_by_assignment(labels: Tensor, experts: Tensor, num_labels: int, num_experts: int) -> Tensor:
    counts = torch.zeros(num_labels, num_experts, dtype=torch.long)
    counts[labels, experts] += 1
    return counts


def _counts_transposed(labels: Tensor, experts: Tensor, num_labels: int, num_experts: int) -> Tensor:
    return load_matrix(experts, labels, num_experts, num_labels)


_LOAD_MATRIX = Exercise(
    key="08.1",
    title="Who goes where",
    task="Write `load_matrix`: count how many tokens of each label chose each expert. Labels that no token has and "
    "experts that no token chose still get their row or column of zeros.",
    difficulty="easy",
    importance="essential",
    minutes=8,
    solution=load_matrix,
    draw=_draw_choices,
    mistakes=(
        Mistake(
            _counts_by_assignment,
            "`counts[labels, experts] += 1` adds 1 to a cell only once, however often the pair occurs. Count repeats "
            "too.",
        ),
        Mistake(_counts_transposed, "Labels are the rows and experts the columns; yours is transposed."),
    ),
    hints=(
        "Number the cells of the table row by row; each token then has the number of its cell.",
        "`torch.bincount(cells, minlength=...)` counts how often each number occurs. Then `.view` makes it a table.",
    ),
)


def mutual_information(counts: Tensor) -> Tensor:
    """counts [G, E] -> a scalar: bits that the expert reveals about the label."""
    p = counts / counts.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    seen = p > 0
    return (p[seen] * (p[seen] / independent[seen]).log2()).sum()


def _draw_table(generator: torch.Generator) -> tuple[Tensor]:
    G, E = torch.randint(2, 7, (2,), generator=generator).tolist()
    counts = torch.randint(0, 20, (G, E), generator=generator)
    counts[0, 0] = 40  # one busy cell: rows differ, and the table is never empty
    counts[-1, -1] = 0  # and one empty cell
    return (counts,)


def _information_in_nats(counts: Tensor) -> Tensor:
    return mutual_information(counts) * math.log(2)


def _information_with_nan(counts: Tensor) -> Tensor:
    p = counts / counts.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    return (p * (p / independent).log2()).sum()


def _entropy_of_cells(counts: Tensor) -> Tensor:
    p = counts[counts > 0] / counts.sum()
    return -(p * p.log2()).sum()


_MUTUAL_INFORMATION = Exercise(
    key="08.2",
    title="What a choice reveals",
    task="Write `mutual_information`: the sum over all cells of $p(g,e) \\log_2 \\frac{p(g,e)}{p(g)\\,p(e)}$, in bits. "
    "Empty cells add nothing.",
    difficulty="medium",
    importance="essential",
    minutes=10,
    solution=mutual_information,
    draw=_draw_table,
    mistakes=(
        Mistake(_information_with_nan, "An empty cell gives 0 × log 0, which is NaN. Leave empty cells out."),
        Mistake(_information_in_nats, "That is in nats: you took the natural logarithm. Bits need base 2."),
        Mistake(
            _entropy_of_cells,
            "That is the entropy of the cells. Mutual information compares each cell with what it would hold by "
            "chance.",
        ),
    ),
    hints=(
        "First make probabilities: divide the table by its sum. The sums of rows and columns are p(g) and p(e).",
        "`p.sum(1, keepdim=True) * p.sum(0, keepdim=True)` is the table that chance would give.",
        "Choose the cells with `p > 0` before you take the logarithm.",
    ),
)


def gates_without(logits: Tensor, removed: int) -> Tensor:
    """logits [T, E] -> top-2 gates [T, E], rows summing to 1, as if expert `removed` did not exist."""
    logits = logits.index_fill(1, torch.tensor([removed]), -torch.inf)
    best, index = logits.topk(2, dim=1)
    return torch.zeros_like(logits).scatter(1, index, best.softmax(dim=1))


def _draw_removal(generator: torch.Generator) -> tuple[Tensor, int]:
    T, E = (torch.randint(0, 5, (2,), generator=generator) + 4).tolist()
    logits = torch.randn(T, E, generator=generator) - 3  # negative, so that 0 is not a small logit
    removed = int(torch.randint(E, (1,), generator=generator))
    logits[0, removed] = 1.0  # some token's first choice
    return logits, removed


def _gates_with_zero_logit(logits: Tensor, removed: int) -> Tensor:
    logits = logits.index_fill(1, torch.tensor([removed]), 0.0)
    best, index = logits.topk(2, dim=1)
    return torch.zeros_like(logits).scatter(1, index, best.softmax(dim=1))


def _gates_silenced(logits: Tensor, removed: int) -> Tensor:
    best, index = logits.topk(2, dim=1)
    gates = torch.zeros_like(logits).scatter(1, index, best.softmax(dim=1))
    return gates.index_fill(1, torch.tensor([removed]), 0.0)


def _gates_of_all_left(logits: Tensor, removed: int) -> Tensor:
    probs = logits.index_fill(1, torch.tensor([removed]), -torch.inf).softmax(dim=1)
    best, index = probs.topk(2, dim=1)
    return torch.zeros_like(logits).scatter(1, index, best)


_ABLATION = Exercise(
    key="08.3",
    title="Route around a missing expert",
    task="Write `gates_without`: each token takes its two best remaining experts; the two gates are the softmax of "
    "their logits. Leave `logits` unchanged.",
    difficulty="medium",
    importance="important",
    minutes=10,
    solution=gates_without,
    draw=_draw_removal,
    mistakes=(
        Mistake(
            _gates_with_zero_logit,
            "You gave the missing expert a logit of 0, and 0 beats every negative logit. Which logit never wins?",
        ),
        Mistake(
            _gates_silenced,
            "You chose first and removed afterwards, so some rows no longer sum to 1. Remove before you choose.",
        ),
        Mistake(
            _gates_of_all_left,
            "Those are probabilities among all remaining experts. Gates compare only the two chosen ones.",
        ),
    ),
    hints=(
        "Remove the expert before choosing; the rest is plain top-2 routing.",
        "`logits.index_fill(1, torch.tensor([removed]), value)` gives a changed copy.",
    ),
)


def experts_to_keep(load: Tensor, keep: int) -> Tensor:
    """load [G, E], tokens of each language at each expert -> [keep] int64: experts, ascending.

    Every language counts equally, however many tokens it has.
    """
    share = load / load.sum(dim=1, keepdim=True)
    return share.sum(dim=0).topk(keep).indices.sort().values


def _draw_load(generator: torch.Generator) -> tuple[Tensor, int]:
    E = int(torch.randint(4, 8, (1,), generator=generator))
    # One large language that uses some experts, and small ones that use others.
    large = torch.randint(500, 999, (1, E), generator=generator) * torch.arange(1, E + 1)
    small = torch.randint(1, 9, (4, E), generator=generator) * torch.arange(E, 0, -1) ** 3
    load = torch.cat([large, small])[:, torch.randperm(E, generator=generator)]
    return load, int(torch.randint(1, E - 1, (), generator=generator))


def _keep_by_total(load: Tensor, keep: int) -> Tensor:
    return load.sum(dim=0).topk(keep).indices.sort().values


def _keep_least(load: Tensor, keep: int) -> Tensor:
    share = load / load.sum(dim=1, keepdim=True)
    return share.sum(dim=0).topk(keep, largest=False).indices.sort().values


def _keep_by_rank(load: Tensor, keep: int) -> Tensor:
    share = load / load.sum(dim=1, keepdim=True)
    return share.sum(dim=0).topk(keep).indices


_PRUNING = Exercise(
    key="08.4",
    title="Prune, and be fair",
    task="Write `experts_to_keep`: the `keep` most active experts, where a language with few tokens counts as much as "
    "one with many. Give their numbers in ascending order.",
    difficulty="medium",
    importance="helpful",
    minutes=8,
    solution=experts_to_keep,
    draw=_draw_load,
    mistakes=(
        Mistake(
            _keep_by_total,
            "You added up tokens, so the largest language decides alone. Turn each row into shares first.",
        ),
        Mistake(
            _keep_by_rank, "The right experts, but busiest first. Give their numbers in ascending order."
        ),
        Mistake(_keep_least, "Those are the least active: the ones to prune, not to keep."),
    ),
    hints=(
        "Divide each row by its sum: then every language has one vote to spread over the experts.",
        "Add the shares of each column, take `topk`, and sort the numbers.",
    ),
)


def chance(labels: Tensor, experts: Tensor, order: Tensor, num_labels: int, num_experts: int) -> Tensor:
    """labels, experts, order (a permutation), each [N] -> a scalar: bits that remain by chance.

    Token i gets the label of token order[i], and keeps its expert.
    """
    cells = labels[order] * num_experts + experts
    counts = torch.bincount(cells, minlength=num_labels * num_experts)
    p = counts.view(num_labels, num_experts) / len(labels)
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    seen = p > 0
    return (p[seen] * (p[seen] / independent[seen]).log2()).sum()


def _draw_shuffle(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int, int]:
    N = int(torch.randint(40, 60, (1,), generator=generator))
    labels = torch.randint(3, (N,), generator=generator)
    experts = (labels + (torch.rand(N, generator=generator) < 0.2)) % 4  # closely related
    return labels, experts, torch.randperm(N, generator=generator), 3, 4


def _chance_of_pairs(
    labels: Tensor, experts: Tensor, order: Tensor, num_labels: int, num_experts: int
) -> Tensor:
    return chance(labels[order], experts[order], torch.arange(len(order)), num_labels, num_experts)


def _chance_is_zero(
    labels: Tensor, experts: Tensor, order: Tensor, num_labels: int, num_experts: int
) -> Tensor:
    return torch.zeros(())


_CHANCE = Exercise(
    key="08.5",
    title="What chance alone would show",
    task="Write `chance`: the information that remains when token `i` is given the label of token `order[i]`. You "
    "may call your `mutual_information` and `load_matrix` inside.",
    difficulty="hard",
    importance="essential",
    minutes=8,
    solution=chance,
    draw=_draw_shuffle,
    mistakes=(
        Mistake(
            _chance_of_pairs,
            "You shuffled labels and experts together, so every pair stayed a pair. Shuffle only the labels.",
        ),
        Mistake(
            _chance_is_zero,
            "In a finite sample even unrelated labels seem to reveal something. Measure it on the shuffled labels.",
        ),
    ),
    hints=(
        "Shuffling breaks the link between label and expert; whatever information you still measure is due to chance.",
        "Replace `labels` by `labels[order]`, leave `experts` unchanged, and measure as before.",
    ),
)

EXERCISES = (_LOAD_MATRIX, _MUTUAL_INFORMATION, _ABLATION, _PRUNING, _CHANCE)
