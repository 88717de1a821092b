"""The explorers by name, in the order of the lessons."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from IPython.display import display

from moe_edu.explorers.explorer import Explorer

NAMES = (
    "first_steps",
    "budget",
    "router_board",
    "capacity_queue",
    "dispatch_rows",
    "router_training",
    "routing_layers",
    "learning_curve",
    "expert_map",
    "cluster",
    "two_of_128",
)


def get(name: str) -> Explorer:
    """The explorer called `name`, `EXPLORER` in the module of that name.

    Raises:
        ValueError: no explorer has this name; the message lists near matches.
    """
    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=3, cutoff=0.4) or NAMES
        raise ValueError(f"there is no explorer {name!r}; did you mean {' or '.join(near)}?")
    explorer: Explorer = import_module(f"moe_edu.explorers.{name}").EXPLORER
    return explorer


def show(name: str, **state: Any) -> None:
    """Show an explorer below the cell; `state` sets the initial values of fields, such as `temperature=2.0`.

    Raises:
        ValueError: no such explorer or field, or a value out of range.
    """
    explorer = get(name)
    view = explorer.view(explorer.state(**state))
    display({"text/html": explorer.html(**state), "text/plain": view["sentence"]}, raw=True)
