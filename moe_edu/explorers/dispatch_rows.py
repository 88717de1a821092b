"""Dispatch, step by step: words become rows sorted by expert, travel to their experts, come back and are mixed."""

from __future__ import annotations

import torch

from moe_edu.analysis.six_words import LANGUAGES, WORDS, six_words
from moe_edu.explorers.explorer import Choice, Explorer, Slider, State, View
from moe_edu.explorers.wording import count, fixed, listed
from moe_edu.moe.dispatch import DispatchPlan, plan_dispatch
from moe_edu.moe.routing import RouterOutput, top2_gating

_LOGITS = six_words(torch.float64).logits
_ROUTING = top2_gating(_LOGITS, capacity=len(WORDS))  # room for all; each capacity keeps a part of it


def view(state: State) -> View:
    """Plan the dispatch of the six words with `capacity` slots per expert.

    Returns:
        `kept` `[T, 2]`, `gates` `[T, 2]`; `order` `[N]`, the flat choice in each row; `row` `[T, 2]`, the row of each
        choice; `slot` `[T, 2]`, its slot in its expert (-1 for none); `counts` `[E]`.
    """
    routing = top2_gating(_LOGITS, capacity=state["capacity"])
    plan = plan_dispatch(routing)
    row = plan.row.view_as(routing.expert_index)
    starts = plan.counts.cumsum(0) - plan.counts
    slot = (row - starts[routing.expert_index]).where(routing.kept, -1)
    t = WORDS.index(state["word"])
    return {
        "kept": routing.kept.tolist(),
        "gates": routing.combine_weights.tolist(),
        "order": plan.order.tolist(),
        "row": row.tolist(),
        "slot": slot.tolist(),
        "counts": plan.counts.tolist(),
        "shown": {"capacity": count(state["capacity"], "slot")},
        "sentence": _sentence(state, routing, plan),
        "met": [
            int((~routing.kept).sum()) == 1,
            state["step"] == 5 and int(routing.kept[t].sum()) == 1,
            state["step"] >= 2 and t in _farthest_apart(routing, plan),
        ],
    }


def _sentence(state: State, routing: RouterOutput, plan: DispatchPlan) -> str:
    t, word = WORDS.index(state["word"]), f"“{state['word']}”"
    first, second = routing.expert_index[t].tolist()
    kept = [k for k in range(2) if routing.kept[t, k]]
    experts = [f"{int(routing.expert_index[t, k])}" for k in kept]
    homeless = int((~routing.kept).sum())
    match state["step"]:
        case 1:
            return f"{word} chooses expert {first} first and expert {second} second: one word makes two rows."
        case 2:
            rows = [str(row) for row in sorted(int(plan.row[2 * t + k]) for k in kept)]
            where = f"is in row{'s' if len(rows) > 1 else ''} {listed(rows)}" if rows else "has no row left"
            ending = f" {count(homeless, 'choice')} found no room and come last." if homeless > 1 else ""
            ending = " 1 choice found no room and comes last." if homeless == 1 else ending
            return f"After sorting by expert, {word} {where}.{ending}"
        case 3:
            counts = listed([str(n) for n in plan.counts.tolist()])
            empty = routing.num_experts * routing.capacity - int(plan.counts.sum())
            return (
                f"The experts multiply {counts} rows, one block each; "
                f"{empty} of {routing.num_experts * routing.capacity} slots stay empty."
            )
        case 4:
            if not kept:
                return f"Every row returns to the word it came from. Nothing returns to {word}."
            plural = "s" if len(kept) > 1 else ""
            return (
                f"Every row returns to the word it came from: {word} gets the output{plural} of "
                f"expert{plural} {listed(experts)}."
            )
        case _:
            if not kept:
                return (
                    f"No expert took {word}: its output is zero, and the residual connection carries it past the "
                    "layer."
                )
            gates = [fixed(float(routing.combine_weights[t, k])) for k in kept]
            parts = " + ".join(
                f"{gate} × expert {expert}" for gate, expert in zip(gates, experts, strict=True)
            )
            return f"{word} becomes {parts}."


def _farthest_apart(routing: RouterOutput, plan: DispatchPlan) -> list[int]:
    """The words, of those that kept both choices, whose two rows are farthest apart."""
    row = plan.row.view(-1, 2)
    apart = (row[:, 0] - row[:, 1]).abs().where(routing.kept.all(dim=1), 0)
    return [t for t, distance in enumerate(apart.tolist()) if distance == int(apart.max()) > 0]


EXPLORER = Explorer(
    name="dispatch_rows",
    title="Rows travel to the experts and back",
    purpose="Move the step from 1 to 5, change the number of slots per expert, and click a word to follow it.",
    fields=(
        Slider("step", "Step", 1, 5, 1, 2),
        Slider("capacity", "Slots per expert", 1, 6, 1, 4, unit="slots"),
        Choice("word", "Follow", tuple((word, word) for word in WORDS), "cat"),
    ),
    challenges=(
        "Find the number of slots at which exactly one choice finds no room.",
        "Find a word that keeps only one of its two rows, and follow it to step 5.",
        "Among the words that keep both rows, follow one whose rows are farthest apart after sorting.",
    ),
    view=view,
    solutions=(
        {"capacity": 3},
        {"step": 5, "capacity": 3, "word": "chat"},
        {"word": "le"},
    ),
    height=374,
    data={
        "words": WORDS,
        "languages": LANGUAGES,
        "num_experts": _ROUTING.num_experts,
        "expert": _ROUTING.expert_index.tolist(),
        "position": _ROUTING.position.tolist(),
        "probs": _ROUTING.probs.gather(1, _ROUTING.expert_index).tolist(),
    },
)
