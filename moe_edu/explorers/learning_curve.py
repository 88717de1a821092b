"""Two training runs to step through: loss, chrF++, expert load and translations at every step.

The values are those of `moe_edu.experiments.learning_history`: one run with the balancing loss and one without.
"""

from __future__ import annotations

from typing import Any

from moe_edu.experiments.learning_history import SNAPSHOT_EVERY, WINDOW, read_history
from moe_edu.explorers.explorer import Choice, Explorer, Slider, State, View
from moe_edu.explorers.wording import fixed, percent

_HISTORY = read_history()
_RUNS: dict[str, dict[str, Any]] = {
    weight: {"points": run["points"], "snapshots": run["snapshots"]}
    for weight, run in _HISTORY["runs"].items()
}
_PHRASES: list[dict[str, str]] = _HISTORY["phrases"]
_LAST_STEP = _RUNS["0.01"]["points"][-1]["step"]


def view(state: State) -> View:
    """Look up one step of one run.

    Returns:
        `point` and `snapshot` (indices into the run's lists; the last snapshot up to this step, -1 before the first),
        `loss`, `chrf` (None before the first snapshot), `load` `[E]`, `left_behind`, `right` (for each phrase).
    """
    run = _RUNS[state["weight"]]
    place = int(state["step"]) // WINDOW - 1
    point = run["points"][place]
    looked = int(state["step"]) // SNAPSHOT_EVERY - 1
    chrf = run["snapshots"][looked]["chrf"] if looked >= 0 else None
    right = _right(run, looked)
    load, behind = point["load"], point["left_behind"]
    quality = (
        "nothing has been translated yet"
        if chrf is None
        else f"at the last check chrF++ was {fixed(chrf, 0)} and {sum(right)} of {len(_PHRASES)} phrases were right"
    )
    busiest = load.index(max(load))
    return {
        "point": place,
        "snapshot": looked,
        "loss": point["loss"],
        "chrf": chrf,
        "load": load,
        "left_behind": behind,
        "right": right,
        "sentence": (
            f"Step {int(state['step'])}: the loss is {fixed(point['loss'])}; {quality}. "
            f"Expert {busiest} is the first choice of {percent(load[busiest])} of the tokens; "
            f"{percent(behind, 1)} of all tokens find no room in any expert."
        ),
        "met": [
            point["loss"] < 2.5 and chrf is not None and chrf < 10,
            any(right) and not any(_right(run, looked - 1)),
            state["weight"] == "0" and min(load) < 0.005,
        ],
    }


def _right(run: dict[str, Any], looked: int) -> list[bool]:
    """For each phrase, whether snapshot `looked` (-1 for before the first) equals the human's translation."""
    said = run["snapshots"][looked]["translations"] if looked >= 0 else [None] * len(_PHRASES)
    return [text == phrase["human"] for text, phrase in zip(said, _PHRASES, strict=True)]


EXPLORER = Explorer(
    name="learning_curve",
    title="A run, step by step",
    purpose="Step through a finished run. The thin dashed line is the other run; their losses are almost the same.",
    fields=(
        Choice("weight", "Balancing loss", (("0.01", "weight 0.01"), ("0", "weight 0: left out")), "0.01"),
        Slider("step", "Step", WINDOW, _LAST_STEP, WINDOW, SNAPSHOT_EVERY),
    ),
    challenges=(
        "Find a step with a loss below 2.5 and chrF++ still below 10.",
        "Find the step at which a phrase is right for the first time.",
        "Turn the balancing loss off, and find an expert with nothing to do.",
    ),
    view=view,
    solutions=(
        {"step": 200},
        {"step": 500},
        {"weight": "0", "step": 1000},
    ),
    height=410,
    data={
        "runs": _RUNS,
        "phrases": _PHRASES,
        "window": WINDOW,
        "snapshot_every": SNAPSHOT_EVERY,
        "last": _LAST_STEP,
    },
)
