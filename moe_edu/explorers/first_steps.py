"""First steps: one word, two experts, and the gates that follow from their scores."""

from __future__ import annotations

import torch

from moe_edu.explorers.explorer import Explorer, Grid, State, Text, View
from moe_edu.explorers.wording import fixed
from moe_edu.moe.routing import top2_gating

_NO_WORD = "…"


def view(state: State) -> View:
    """Route one word to two experts.

    Returns:
        `word`; `chosen`, the two experts in the order of choice; `gates`, one per expert.
    """
    logits = torch.tensor(state["scores"], dtype=torch.float64)
    routing = top2_gating(logits, capacity=1)
    chosen, gates = routing.expert_index[0].tolist(), routing.combine_matrix()[0].tolist()
    word = state["word"] or _NO_WORD
    quoted = f"“\u2068{word}\u2069”"  # the isolates keep the marks around right-to-left text
    if state["scores"][0][0] == state["scores"][0][1]:
        sentence = f"Expert 0 and expert 1 count the same for {quoted}: {fixed(gates[0])} each."
    else:
        first, second = chosen
        sentence = (
            f"For {quoted}, expert {first} is the first choice, with gate {fixed(gates[first])}; "
            f"expert {second} is the second, with gate {fixed(gates[second])}."
        )
    return {
        "word": word,
        "chosen": chosen,
        "gates": gates,
        "sentence": sentence,
        "met": [
            chosen[0] == 1,
            state["scores"][0][0] == state["scores"][0][1],
            gates[0] >= 0.985 and state["scores"][0][0] <= 1,  # what is shown as 0.99
        ],
    }


EXPLORER = Explorer(
    name="first_steps",
    title="First steps",
    purpose="Drag a score up or down, or click it and use the arrow keys. Type a word of your own.",
    fields=(
        Text("word", "Word", "cat", max_length=12),
        Grid("scores", "Scores", -4.0, 4.0, 0.1, ((1.0, -0.5),)),
    ),
    challenges=(
        "Make expert 1 the first choice.",
        "Make both experts count the same.",
        "Give expert 0 a gate of 0.99 or more, with a score of at most 1.",
    ),
    view=view,
    solutions=(
        {"scores": ((1.0, 2.0),)},
        {"scores": ((-0.5, -0.5),)},
        {"scores": ((1.0, -4.0),)},
    ),
    height=236,
)
