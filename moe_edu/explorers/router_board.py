"""The router board: drag a word's logits and see which two experts it chooses, and with which gates."""

from __future__ import annotations

from typing import Any

import torch

from moe_edu.analysis.six_words import LANGUAGES, WORDS, six_words
from moe_edu.explorers.explorer import Choice, Explorer, Grid, Slider, State, View
from moe_edu.explorers.wording import count, fixed, listed
from moe_edu.moe.routing import top2_gating

_DRAWS = 12
_LOGITS = six_words(torch.float64).logits
_ROWS = tuple(tuple(round(logit, 1) for logit in row) for row in _LOGITS.tolist())


def view(state: State) -> View:
    """Route the words without a limit on capacity.

    Returns:
        `probs` `[T, E]`, `chosen` `[T, 2]` (-1 for none), `gates` `[T, 2]`, `load` `[E]` choices per expert.
    """
    logits = torch.tensor(state["logits"], dtype=torch.float64) / state["temperature"]
    routing = top2_gating(
        logits,
        capacity=len(WORDS),
        second_expert_policy=state["policy"],
        generator=torch.Generator().manual_seed(state["draw"]),
    )
    chosen, gates = routing.expert_index, routing.combine_weights
    if state["choices"] == "1":
        chosen = torch.stack([chosen[:, 0], torch.full_like(chosen[:, 0], -1)], dim=1)
        gates = torch.eye(2, dtype=torch.float64)[:1].expand(len(WORDS), 2)
    load = torch.bincount(chosen[chosen >= 0], minlength=logits.shape[1]).tolist()
    top = routing.probs.max(dim=1).values
    surest = int(top.argmax())
    idle = [str(expert) for expert, choices in enumerate(load) if choices == 0]
    alone = int((chosen[:, 1] < 0).sum())
    two = state["choices"] == "2"
    sentence = (
        f"The router is most confident about “{WORDS[surest]}”: expert {int(chosen[surest, 0])} has probability "
        f"{fixed(float(top[surest]))}. "
        + (
            f"No word chooses expert{'s' if len(idle) > 1 else ''} {listed(idle)}."
            if idle
            else "Every expert is chosen by some word."
        )
        + (
            f" {count(alone, 'word')} {'has' if alone == 1 else 'have'} no second expert."
            if two and alone
            else ""
        )
    )
    return {
        "probs": routing.probs.tolist(),
        "chosen": chosen.tolist(),
        "gates": gates.tolist(),
        "load": load,
        "sentence": sentence,
        "met": [
            bool(chosen[WORDS.index("cat"), 0] != chosen[WORDS.index("chat"), 0]),
            max(map(max, state["logits"])) <= 2.5 and float(top.max()) >= 0.95,
            state["policy"] == "random" and two and alone >= 4,
        ],
    }


def _noise() -> dict[str, Any]:
    """What each draw's generator produces: Gumbel noise `[T, E]` for "sampling", uniform `[T]` for "random"."""

    def generator(draw: int) -> torch.Generator:
        return torch.Generator().manual_seed(draw)

    draws = range(1, _DRAWS + 1)
    gumbel = [-torch.empty_like(_LOGITS).exponential_(generator=generator(draw)).log() for draw in draws]
    uniform = [torch.rand(len(WORDS), generator=generator(draw), dtype=_LOGITS.dtype) for draw in draws]
    return {
        "gumbel": [noise.round(decimals=6).tolist() for noise in gumbel],
        "uniform": [noise.round(decimals=6).tolist() for noise in uniform],
    }


EXPLORER = Explorer(
    name="router_board",
    title="The router board",
    purpose="Drag a word's logits, and watch its probabilities, its two experts and their gates.",
    fields=(
        Slider("temperature", "Temperature", 0.2, 4.0, 0.1, 1.0),
        Choice("choices", "Experts per word", (("1", "top-1"), ("2", "top-2")), "2"),
        Choice(
            "policy",
            "Second expert",
            (("all", "all: the runner-up"), ("sampling", "sampling"), ("random", "random")),
            "all",
        ),
        Slider("draw", "Noise draw", 1, _DRAWS, 1, 1),
        Grid("logits", "Logits", -3.0, 5.0, 0.1, _ROWS),
    ),
    challenges=(
        "Send “cat” and “chat” to different first experts.",
        "Give one first choice a probability of at least 0.95, with no logit above 2.5.",
        "With the policy random, find a draw in which four words get no second expert.",
    ),
    view=view,
    solutions=(
        {"logits": (*_ROWS[:4], (1.0, 2.0, 0.9, 3.0), _ROWS[5])},
        {"temperature": 0.4},
        {"policy": "random", "draw": 2},
    ),
    height=330,
    data={"words": WORDS, "languages": LANGUAGES, **_noise()},
)
