"""Two of 128: what a sparse layer computes when a one-hot mask is passed where expert indices are expected.

NLLB-MoE in transformers does so in releases 5.0.0, 5.23.0 and 5.24.0 (`modeling_nllb_moe.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.analysis.six_words import LANGUAGES, WORDS, six_words
from moe_edu.explorers.explorer import Choice, Explorer, Slider, State, Toggle, View
from moe_edu.explorers.wording import count, listed
from moe_edu.moe.routing import RouterOutput, top2_gating

_MOST_EXPERTS = 16
_TESTS = (
    "the output has the right shape",
    "no value is infinite or NaN",
    "the router chooses like a loop",
    "a word's gates sum to 1",
    "the chosen experts are those that run",
    "the output equals that of a loop",
)
_TOLERANCE = 1e-6


def _make_up(seed: int, scale: float, low: float) -> Tensor:
    uniform = torch.rand(len(WORDS), _MOST_EXPERTS, generator=torch.Generator().manual_seed(seed))
    return (low + scale * uniform.double()).round(decimals=1)


def _logits() -> Tensor:
    """`[T, 16]`: the six words' four experts, and twelve more; the fractions keep ties out."""
    logits = _make_up(0, 3.2, -0.5)
    logits[:, :4] = six_words(torch.float64).logits
    return logits + 0.003 * torch.arange(_MOST_EXPERTS)


_LOGITS = _logits()
_ANSWERS = _make_up(1, 2.0, -1.0) + 0.003 * torch.arange(_MOST_EXPERTS)  # each expert's output for each word


def _weights_published(routing: RouterOutput) -> tuple[Tensor, list[int]]:
    """The weight `[T, E]` of each expert's output in each word, and the rows that each expert computes."""
    gates, E = routing.combine_matrix(), routing.num_experts
    mask = F.one_hot(routing.expert_index[:, 0], E)  # [T, E]
    taken = F.one_hot(mask, E).permute(2, 1, 0)  # [E, slot, T]: read as if `mask` held indices
    weights = torch.zeros_like(gates)
    for expert in range(E):
        slot, token = torch.where(taken[expert])
        weights[:, expert].index_add_(0, token, gates[token, slot])
    return weights, taken.sum(dim=(1, 2)).tolist()


def view(state: State) -> View:
    """Route the words, then run the layer as published or as fixed.

    Returns:
        `chosen` `[T, 2]` and `gates` `[T, 2]` of the router; `weights` `[T, E]` of each expert's output in
        each word; `rows` `[E]` that each computes; `errors` `[T]`; `tests`, which of the six pass.
    """
    E = int(state["experts"])
    logits, answers = _LOGITS[:, :E].clone(), _ANSWERS[:, :E]
    logits[:, 1] += state["push"]
    if state["copies"]:
        answers = answers[:, :1].expand(-1, E)
    routing = top2_gating(logits, capacity=2 * len(WORDS))
    gates = routing.combine_matrix()
    published = state["code"] == "published"
    weights, rows = _weights_published(routing) if published else (gates, (gates > 0).sum(dim=0).tolist())

    errors = ((weights - gates) * answers).sum(dim=1).abs()
    wrong = int((errors > _TOLERANCE).sum())
    chosen = sorted(set(routing.expert_index.flatten().tolist()))
    ran = [expert for expert in range(E) if rows[expert]]
    tests = [True, True, True, True, chosen == ran, wrong == 0]
    work = (
        f"Experts 0 and 1 ran, on {rows[0]} and {rows[1]} rows"
        if published
        else f"They ran on {sum(rows)} rows"
    )
    outcome = f"{wrong} of {len(WORDS)} words {'is' if wrong == 1 else 'are'} wrong"
    if not wrong:
        outcome = f"every word is right{' anyway' if published else ''}"
    names = listed([str(expert) for expert in chosen])
    differ = not state["copies"]
    return {
        "chosen": routing.expert_index.tolist(),
        "gates": routing.combine_weights.tolist(),
        "weights": weights.tolist(),
        "rows": rows,
        "errors": errors.tolist(),
        "tests": tests,
        "sentence": f"The router chose {count(len(chosen), 'expert')}: {names}. {work}: {outcome}.",
        "met": [
            published and differ and wrong == 0,
            published and tests[4] and wrong > 0,
            published and wrong == 0 and not tests[4],
        ],
    }


EXPLORER = Explorer(
    name="two_of_128",
    title="Two of 128",
    purpose="Outlines show what the router chose, discs what the layer ran. Make the bug visible, then invisible.",
    fields=(
        Choice(
            "code",
            "Layer",
            (("published", "as in transformers 5.24.0"), ("fixed", "fixed")),
            "published",
        ),
        Slider("experts", "Experts", 2, _MOST_EXPERTS, 1, 8),
        Slider("push", "Added to expert 1", -3.0, 3.0, 0.5, 0.0),
        Toggle("copies", "All experts are copies of one", False),
    ),
    challenges=(
        "As published, with different experts: get every word right.",
        "As published: let exactly the chosen experts run, and still get a word wrong.",
        "As published: get the output of the loop although chosen experts never ran.",
    ),
    view=view,
    solutions=({"experts": 2, "push": 3.0}, {"experts": 2}, {"copies": True}),
    height=390,
    data={
        "words": WORDS,
        "languages": LANGUAGES,
        "logits": _LOGITS.round(decimals=6).tolist(),
        "answers": _ANSWERS.round(decimals=6).tolist(),
        "tests": _TESTS,
    },
)
