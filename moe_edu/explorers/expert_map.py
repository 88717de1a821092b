"""The expert map: which languages send their tokens to which expert, with the words in each cell."""

from __future__ import annotations

from functools import cache
from typing import Any

from moe_edu.data import get_language
from moe_edu.experiments.specialisation import load_results
from moe_edu.explorers.explorer import Choice, Explorer, Slider, State, Toggle, View
from moe_edu.explorers.wording import fixed, listed, percent

# Sixteen of the 34 languages, in nine of the fifteen scripts; grouped by script.
LANGUAGES = (
    "eng_Latn",
    "deu_Latn",
    "fra_Latn",
    "spa_Latn",
    "fin_Latn",
    "tur_Latn",
    "rus_Cyrl",
    "ukr_Cyrl",
    "ell_Grek",
    "arb_Arab",
    "pes_Arab",
    "hin_Deva",
    "tam_Taml",
    "jpn_Jpan",
    "zho_Hans",
    "kor_Hang",
)
_WORDS = 3
_TITLES = {
    "letters": ("letters", "the encoder that restores masked letters"),
    "translator": ("tokens", "the encoder of the translator into English"),
    "decoder": ("tokens", "the decoder that writes ten languages"),
}
_SIDES = {"letters": None, "translator": "encoder", "decoder": "decoder"}


def view(state: State) -> View:
    """Read one cell of a map.

    Returns:
        `rows` (language codes), `shares` `[G, E]` (of each language's tokens, the part that chose the expert first),
        `row` and `expert` of the selected cell, its `words`, `scripts` (of the expert's tokens, the part of each
        script, with equal weight for every language; largest first), and `bits` above chance, over all languages.
        `shown` has the labels of the sliders' values.
    """
    data = _data()[state["model"]]
    found = data["trained" if state["trained"] else "untrained"]
    shares = [[number / sum(counts) for number in counts] for counts in found["load"]]
    row = min(state["row"], len(shares)) - 1  # smaller models have fewer
    expert = min(state["expert"], len(shares[0]) - 1)
    share = shares[row][expert]
    words = found["words"][row][expert]
    bits = found["bits"]
    unit, title = _TITLES[state["model"]]
    name = data["names"][row]
    sentence = (
        f"In {title} ({'trained' if state['trained'] else 'untrained'}), the chosen expert tells you "
        f"{fixed(bits)} bits about the language, above chance. For {percent(share)} of the {unit} in {name}, the first "
        f"choice is expert {expert}"
        + (f", most often in {listed([_quoted(word) for word in words])}." if words else ".")
    )
    return {
        "shown": {"row": _short(name), "expert": str(expert)},
        "rows": data["codes"],
        "shares": shares,
        "row": row,
        "expert": expert,
        "words": words,
        "scripts": scripts_of(expert, shares, data["scripts"]),
        "bits": bits,
        "sentence": sentence,
        "met": [state["trained"] and share >= 0.6, bits < 0.1, state["trained"] and share < 0.0015],
    }


def _short(name: str) -> str:
    """A language's name, shortened to fit next to the map and its slider."""
    return name.split(" (")[0].replace("Modern Standard ", "").replace("Western ", "")


def _quoted(word: str) -> str:
    """`word` in quotation marks that stay around it even if it is written from right to left."""
    return f"“\u2068{word}\u2069”"


def scripts_of(expert: int, shares: list[list[float]], scripts: list[str]) -> list[list[Any]]:
    """[script, part] of the tokens that chose `expert`, with equal weight for every language; largest first."""
    parts: dict[str, float] = {}
    for row, script in zip(shares, scripts, strict=True):
        parts[script] = parts.get(script, 0.0) + row[expert]
    whole = sum(parts.values())
    ranked = sorted(parts.items(), key=lambda item: -item[1])
    return [[script, part / whole if whole else 0.0] for script, part in ranked]


@cache
def _data() -> dict[str, Any]:
    """The maps that ship, of the first seed, for the languages that are shown."""
    return {model: _map(model) for model in _SIDES}


def _map(model: str) -> dict[str, Any]:
    results = load_results(model)
    side = _SIDES[model]
    run = results["runs"][0]
    reports = {state: run[state][side] if side else run[state] for state in ("trained", "untrained")}
    places = [results["languages"].index(code) for code in LANGUAGES if code in results["languages"]]
    rows = [row for row in places if any(reports["trained"]["load"][row])]  # one model never reads English
    codes = [results["languages"][row] for row in rows]
    maps: dict[str, Any] = {
        "codes": codes,
        "names": [get_language(code).name for code in codes],
        "scripts": [get_language(code).script_name for code in codes],
    }
    for state, report in reports.items():
        information = report["information"]["language"]
        maps[state] = {
            "load": [report["load"][row] for row in rows],
            "words": [[words[:_WORDS] for words in report["words"][row]] for row in rows],
            "bits": round(information["bits"] - information["chance"], 4),
        }
    return maps


EXPLORER = Explorer(
    name="expert_map",
    title="The expert map",
    purpose="Choose a model, compare it with its untrained twin, and click a cell to see its words.",
    fields=(
        Choice(
            "model",
            "Model",
            tuple((name, title.removeprefix("the ")) for name, (_, title) in _TITLES.items()),
            "letters",
        ),
        Toggle("trained", "Trained", True),
        Slider("row", "Language", 1, len(LANGUAGES), 1, 7),
        Slider("expert", "Expert", 0, 15, 1, 13),
    ),
    challenges=(
        "In a trained model, find a language that sends 60 % or more of its tokens to one expert.",
        "Find a router that tells you less than 0.1 bits about the language.",
        "In a trained model, find an expert that a language almost never chooses: less than 0.2 %.",
    ),
    view=view,
    solutions=({"row": 10, "expert": 14}, {"trained": False}, {"row": 1, "expert": 13}),
    height=416,
    data=_data(),
)
