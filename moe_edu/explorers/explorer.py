"""What an explorer is: the fields of its state, its pure function, and the two ways to mount it.

The state is a flat dictionary of JSON values, one for each field. `view(state)` computes all numbers that the picture
shows; `static/<name>.js` has the same function, `compute`, for pages without a kernel, and draws the result. Tests
compare the two on random states.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import anywidget
import traitlets

from moe_edu.figures.theme import expert_style

State: TypeAlias = dict[str, Any]
View: TypeAlias = dict[str, Any]

STATIC = Path(__file__).parent / "static"
_NUM_STYLES = 16  # expert styles that a page gets; further experts reuse them


@dataclass(frozen=True)
class Slider:
    """A number from `low` to `high` in steps of `step`."""

    name: str
    label: str
    low: float
    high: float
    step: float
    initial: float
    unit: str = ""

    def accepts(self, value: Any) -> bool:
        return _is_number(value) and self.low <= value <= self.high

    def draw(self, rng: random.Random) -> float:
        value = self.low + self.step * rng.randrange(round((self.high - self.low) / self.step) + 1)
        return round(value, 6)


@dataclass(frozen=True)
class Choice:
    """One of `options`, each a value and the label that the reader sees."""

    name: str
    label: str
    options: tuple[tuple[str, str], ...]
    initial: str

    def accepts(self, value: Any) -> bool:
        return value in [option for option, _ in self.options]

    def draw(self, rng: random.Random) -> str:
        return rng.choice(self.options)[0]


@dataclass(frozen=True)
class Toggle:
    """On or off."""

    name: str
    label: str
    initial: bool

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def draw(self, rng: random.Random) -> bool:
        return rng.random() < 0.5


@dataclass(frozen=True)
class Text:
    """What the reader types; always shown as plain text."""

    name: str
    label: str
    initial: str
    max_length: int = 80

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and len(value) <= self.max_length

    def draw(self, rng: random.Random) -> str:
        return "".join(rng.choice("abé語<>&\"' ") for _ in range(rng.randrange(self.max_length)))


@dataclass(frozen=True)
class Grid:
    """Numbers `[rows, columns]` that the reader changes on the stage itself."""

    name: str
    label: str
    low: float
    high: float
    step: float
    initial: tuple[tuple[float, ...], ...]

    def accepts(self, value: Any) -> bool:
        shape = [len(row) for row in self.initial]
        return (
            isinstance(value, list | tuple)
            and [len(row) for row in value] == shape
            and all(_is_number(number) and self.low <= number <= self.high for row in value for number in row)
        )

    def draw(self, rng: random.Random) -> list[list[float]]:
        steps = round((self.high - self.low) / self.step)
        return [
            [round(self.low + self.step * rng.randrange(steps + 1), 6) for _ in row] for row in self.initial
        ]


Field: TypeAlias = Slider | Choice | Toggle | Text | Grid


@dataclass(frozen=True)
class Explorer:
    """A picture that the reader moves.

    Attributes:
        name: the name of its module and of its file in `static/`.
        title: the heading of the picture.
        purpose: what to move, in one sentence.
        fields: the state's fields, in the order of the controls; grids are moved on the stage.
        challenges: goals for the reader, one sentence each.
        view: a pure function that maps a state to every number that is shown, `sentence` (what the picture shows now)
            and `met` (for each challenge, whether this state meets it).
        solutions: for each challenge, changes to the initial state that meet it.
        height: height of the stage, which is 720 wide.
        data: constants that the page needs to compute the same numbers, JSON.
    """

    name: str
    title: str
    purpose: str
    fields: tuple[Field, ...]
    challenges: tuple[str, ...]
    view: Callable[[State], View]
    solutions: tuple[Mapping[str, Any], ...]
    height: int
    data: Any = None

    def state(self, **changes: Any) -> State:
        """The initial state with `changes`.

        Raises:
            ValueError: a field that does not exist or a value that it does not accept.
        """
        state = {field.name: _as_json(field.initial) for field in self.fields}
        for name, value in changes.items():
            field = next((field for field in self.fields if field.name == name), None)
            if field is None:
                raise ValueError(f"{self.name} has no field {name!r}; it has {', '.join(state)}")
            if not field.accepts(value):
                raise ValueError(f"{self.name}.{name} does not accept {value!r}: {_limits(field)}")
            state[name] = _as_json(value)
        return state

    def random_state(self, rng: random.Random) -> State:
        """A random state that the reader can reach."""
        return {field.name: field.draw(rng) for field in self.fields}

    def html(self, **changes: Any) -> str:
        """The explorer for any page: interactive where scripts run, otherwise a picture and a sentence."""
        state = self.state(**changes)
        sentence = escape(self.view(state)["sentence"])
        call = f"mount(root, explorer, {_script_json(self.spec())}, {_script_json(state)})"
        return (
            f'<div class="moe-x" data-explorer="{self.name}"><p><b>{escape(self.title)}.</b> {escape(self.purpose)}</p>'
            f'<p><img src="{picture_address(self.name)}" width="720" alt="{sentence}"></p><p>{sentence}</p></div>'
            f"<script>(() => {{\nconst root = document.currentScript.previousElementSibling;\n"
            f"{bundle(self.name)}\n{call};\n}})();</script>"
        )

    def widget(self, **changes: Any) -> ExplorerWidget:
        """The explorer linked to Python: read and set `widget.state`, or observe it."""
        state = self.state(**changes)
        return ExplorerWidget(self, state)

    def spec(self) -> dict[str, Any]:
        """What the page needs besides the state."""
        return {
            "name": self.name,
            "title": self.title,
            "purpose": self.purpose,
            "fields": [{"kind": type(field).__name__, **asdict(field)} for field in self.fields],
            "challenges": self.challenges,
            "height": self.height,
            "data": self.data,
            "experts": [expert_style(expert)._asdict() for expert in range(_NUM_STYLES)],
        }


class ExplorerWidget(anywidget.AnyWidget):
    """An explorer as a widget; `state` and the page stay in sync."""

    spec = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)

    def __init__(self, explorer: Explorer, state: State) -> None:
        self._explorer = explorer
        esm = f"{bundle(explorer.name)}\nexport default {{ render: (context) => mountWidget(context, explorer) }};"
        super().__init__(_esm=esm, spec=json.loads(json.dumps(explorer.spec())), state=state)

    @traitlets.validate("state")
    def _check_state(self, proposal: Any) -> State:
        """Raises ValueError as `Explorer.state` does."""
        return self._explorer.state(**proposal["value"])

    @property
    def view(self) -> View:
        """The numbers that are shown now."""
        return self._explorer.view(self.state)


def bundle(name: str) -> str:
    """`kit.js` and `<name>.js` as one script, without their `import` and `export`."""
    return f"{_plain_script('kit')}\n{_plain_script(name)}"


def picture_address(name: str) -> str:
    """The picture of the first state, drawn by `python -m moe_edu.explorers.pictures`, as a data address."""
    picture = (STATIC / "pictures" / f"{name}.svg").read_bytes()
    return f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"


@cache
def _plain_script(name: str) -> str:
    lines = (STATIC / f"{name}.js").read_text("utf-8").splitlines()
    kept = (
        line
        for line in lines
        if line and not line.startswith("import ") and not line.lstrip().startswith("//")
    )
    return "\n".join(line.removeprefix("export ") for line in kept)


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element that contains it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _limits(field: Field) -> str:
    match field:
        case Slider() | Grid():
            return f"numbers from {field.low:g} to {field.high:g}" + (
                f", {len(field.initial)} rows of {len(field.initial[0])}" if isinstance(field, Grid) else ""
            )
        case Choice():
            return f"one of {', '.join(value for value, _ in field.options)}"
        case Toggle():
            return "True or False"
        case Text():
            return f"text of at most {field.max_length} characters"
