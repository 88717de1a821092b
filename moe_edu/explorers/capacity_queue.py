"""The capacity queue: which words of a bilingual batch find no room, as capacity, skew and order change."""

from __future__ import annotations

import math

import torch

from moe_edu.analysis.drop_rates import bilingual_batch, skew_logits
from moe_edu.config import MoEConfig
from moe_edu.explorers.explorer import Choice, Explorer, Slider, State, Toggle, View
from moe_edu.explorers.wording import count, listed
from moe_edu.moe.routing import expert_capacity, top2_gating

_BATCH = bilingual_batch()
_LANGUAGES = tuple(dict.fromkeys(_BATCH.languages))
_NAMES = {"eng": "English", "fra": "French"}
_T, _E = _BATCH.logits.shape


def view(state: State) -> View:
    """Route the batch.

    Returns:
        `words` and `languages` `[T]` in the order of the batch; `expert_index`, `kept` `[T, 2]`; `capacity`; for each
        expert its `queues`, pairs of token and choice in the order of the queue; the `dropped` words of each language.
    """
    first_language = state["first"]
    batch = sorted(range(_T), key=lambda t: _BATCH.languages[t] != first_language)
    words, languages = [_BATCH.words[t] for t in batch], [_BATCH.languages[t] for t in batch]
    config = MoEConfig(num_experts=_E, expert_capacity_factor=state["factor"])
    capacity = expert_capacity(_T, config, training=True)
    routing = top2_gating(
        skew_logits(_BATCH.logits[batch], state["skew"]),
        capacity=capacity,
        batch_prioritized=state["priority"],
    )
    queues: list[list[tuple[int, int]]] = [[] for _ in range(_E)]
    for flat in routing.position.flatten().argsort(stable=True).tolist():
        queues[int(routing.expert_index.flatten()[flat])].append(divmod(flat, 2))
    dropped: dict[str, list[str]] = {code: [] for code in _LANGUAGES}
    for token in torch.nonzero(~routing.kept.any(dim=1)).flatten().tolist():
        dropped[languages[token]].append(words[token])
    eng, fra = (len(dropped[code]) for code in _LANGUAGES)
    lost = int((~routing.kept).sum())
    return {
        "words": words,
        "languages": languages,
        "expert_index": routing.expert_index.tolist(),
        "kept": routing.kept.tolist(),
        "capacity": capacity,
        "queues": queues,
        "dropped": dropped,
        "sentence": (
            f"With {count(capacity, 'slot')} per expert, {lost} of {2 * _T} choices "
            f"{'finds' if lost == 1 else 'find'} no room. {_say_dropped(dropped)}"
        ),
        "met": [
            eng + fra == 0 and state["factor"] <= 1,
            state["skew"] >= 2 and eng > 0 and fra == 0,
            state["skew"] >= 2 and state["factor"] <= 1 and abs(eng - fra) <= 1,
        ],
    }


def _say_dropped(dropped: dict[str, list[str]]) -> str:
    if not any(dropped.values()):
        return "No word is dropped: each one gets at least one of its two experts."
    parts = [
        f"{_NAMES[code]} {listed([f'“{word}”' for word in words])}" if words else f"no {_NAMES[code]} words"
        for code, words in dropped.items()
    ]
    return f"Dropped by both experts: {'; '.join(parts)}."


EXPLORER = Explorer(
    name="capacity_queue",
    title="The capacity queue",
    purpose="Two sentences queue for eight experts. Change capacity, skew and order, and see which words are left out.",
    fields=(
        Slider("factor", "Capacity factor", 0.25, 2.0, 0.05, 1.0),
        Slider("skew", "Skew", 0.0, 4.0, 0.1, 2.0),
        Choice("first", "First in the batch", tuple(_NAMES.items()), "eng"),
        Toggle("priority", "Batch priority: highest probability first", False),
    ),
    challenges=(
        "Drop no word with a capacity factor of at most 1.",
        "At a skew of 2 or more, drop only English words.",
        "At a skew of 2 or more and a factor of at most 1, drop as many French as English words, give or take one.",
    ),
    view=view,
    solutions=(
        {"skew": 0.0},
        {"first": "fra", "factor": 1.25},
        {"priority": True},
    ),
    height=420,
    data={
        "words": _BATCH.words,
        "languages": _BATCH.languages,
        "logits": _BATCH.logits.tolist(),
        "pull": torch.linspace(1, 0, _E, dtype=torch.float64).tolist(),
        "perExpert": math.ceil(_T / _E),
    },
)
