"""Explorers: pictures that answer when you move them, with or without a kernel.

Each is a pure Python function `view(state)` and a JavaScript module that computes and draws the same in the page.
`explorers.show("router_board")` puts one into a notebook.
"""

from moe_edu.system.requirements import require_all

require_all()  # before imports that would fail one by one

from moe_edu.explorers.explorer import Choice, Explorer, Grid, Slider, State, Text, Toggle, View  # noqa: E402
from moe_edu.explorers.registry import NAMES, get, show  # noqa: E402

__all__ = [
    "NAMES",
    "Choice",
    "Explorer",
    "Grid",
    "Slider",
    "State",
    "Text",
    "Toggle",
    "View",
    "get",
    "show",
]
