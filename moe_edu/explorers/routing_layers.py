"""Routing, layer by layer: follow a token through four sparse layers, and see which other tokens choose its experts.

The values are those of `moe_edu.experiments.routing_layers`: a translator with four sparse encoder layers, trained
for this picture, and the same model before training.
"""

from __future__ import annotations

from typing import Any

from moe_edu.experiments.routing_layers import read_routes
from moe_edu.explorers.explorer import Choice, Explorer, Slider, State, View
from moe_edu.explorers.wording import listed

_FIELDS = ("language", "text", "english", "tokens", "layers")
_SENTENCES: list[dict[str, Any]] = [
    {field: sentence[field] for field in _FIELDS} for sentence in read_routes()["sentences"]
]
_EXPERTS = 8
_MOST_TOKENS = max(len(sentence["tokens"]) for sentence in _SENTENCES)


def view(state: State) -> View:
    """Look up one token's path.

    Returns:
        `token` (place in the sentence), `path` (its first choice in each layer), `twins` (places of equal tokens),
        `parts` (the first layer, from 1, in which a twin's first choice differs; 0 for none), `groups` `[E]`
        (places of the tokens whose first choice in the chosen layer is e). `shown` names the token of the slider.
    """
    sentence = _SENTENCES[int(state["sentence"])]
    layers, tokens = sentence["layers"][state["model"]], sentence["tokens"]
    token, layer = int(min(state["token"], len(tokens))) - 1, int(state["layer"]) - 1
    firsts = [[first for first, _ in choices["experts"]] for choices in layers]
    path = [choices[token] for choices in firsts]
    twins = [place for place, text in enumerate(tokens) if text == tokens[token] and place != token]
    apart = [
        number
        for number, choices in enumerate(firsts, start=1)
        if any(choices[twin] != choices[token] for twin in twins)
    ]
    parts = apart[0] if apart else 0
    groups = [[t for t, first in enumerate(firsts[layer]) if first == e] for e in range(_EXPERTS)]
    sizes = [len(group) for group in groups]
    busiest = sizes.index(max(sizes))
    said = (
        f"In layers 1 to 4, the first choices of “{tokens[token]}” are experts "
        f"{listed([str(expert) for expert in path])}."
    )
    if twins:
        said += (
            f" The same token also occurs elsewhere, and first chooses differently in layer {parts}."
            if parts
            else " The same token also occurs elsewhere, and chooses the same experts."
        )
    said += f" In layer {layer + 1}, expert {busiest} is the first choice of {sizes[busiest]} of {len(tokens)} tokens."
    return {
        "shown": {"token": tokens[token]},
        "token": token,
        "path": path,
        "twins": twins,
        "parts": parts,
        "groups": groups,
        "sentence": said,
        "met": [
            state["model"] == "trained" and parts == 4,
            state["model"] == "untrained" and parts == 1,
            state["model"] == "trained" and 2 * sizes[busiest] >= len(tokens),
        ],
    }


EXPLORER = Explorer(
    name="routing_layers",
    title="Routing, layer by layer",
    purpose="Choose a sentence, then click a token to follow it and a layer to see its experts.",
    fields=(
        Choice(
            "sentence",
            "Sentence",
            tuple((str(i), f"{s['language'][:3]}: {s['text']}") for i, s in enumerate(_SENTENCES)),
            "0",
        ),
        Choice("model", "Router", (("trained", "trained"), ("untrained", "before training")), "trained"),
        Slider("layer", "Layer", 1, 4, 1, 1),
        Slider("token", "Token", 1, _MOST_TOKENS, 1, 3),
    ),
    challenges=(
        "Trained: find two equal tokens that choose differently only in the last layer.",
        "Before training: find two that choose differently in the first layer.",
        "Trained: find an expert that is the first choice of half of the tokens.",
    ),
    view=view,
    solutions=(
        {"sentence": "4", "token": 3},
        {"model": "untrained", "token": 3},
        {"sentence": "4", "layer": 2},
    ),
    height=420,
    data={"sentences": _SENTENCES, "experts": _EXPERTS},
)
