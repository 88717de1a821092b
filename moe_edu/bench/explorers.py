"""`moe-edu bench explorers`: time from key press to redraw, in a real browser.

There are two ways. In the page: the explorer computes and draws on its own, as in the lessons. Through Python: it runs
in the JupyterLab of `moe-edu lab`, linked to a kernel whose answer to each new state is drawn below it, as in the
translation box.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from moe_edu.bench.lab import Lab, open_lab
from moe_edu.bench.options import json_option, plot_option
from moe_edu.bench.plot import Row, Sample, dots_svg, write_plot
from moe_edu.bench.report import format_machine, write_json
from moe_edu.system.browser import open_browser
from moe_edu.system.machine import Machine, this_machine
from moe_edu.system.requirements import explain_missing

BOX = "translate_box"  # measured with the explorers: the lessons compute it in Python while the reader types
_CONTROL = ".moe-x input[type=range], .moe-x [role=slider], .moe-x select"
_BOX_CONTROL = ".widget-text input"
_ARROWS = ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft")
_LETTERS = ("7", "Backspace")
_MOUNTED = ".moe-x[data-mounted]"
_ANSWER = ".widget-html"
_ANSWER_MS = 2_000  # after which a press counts as unanswered

# The browser stamps a key press on arrival, and the observer learns of the new picture, both on the same clock.
_WATCH = """(observed) => {
  window.times = [];
  let pressed = null;
  addEventListener("keydown", (event) => { pressed = event.timeStamp; }, true);
  new MutationObserver(() => {
    if (pressed !== null) window.times.push(performance.now() - pressed);
    pressed = null;
  }).observe(document.querySelector(observed),
    { subtree: true, childList: true, attributes: true, characterData: true });
}"""

_LINKED_CELL = """
from html import escape
from ipywidgets import HTML, VBox
from moe_edu import explorers, lessons
lessons.begin()
linked, answer = explorers.get({name!r}).widget(), HTML("<p>none yet</p>")
def respond(change):
    answer.value = f"<p>{{escape(str(linked.state))}}: {{escape(str(linked.view))}}</p>"
linked.observe(respond, names="state")
lessons.show(VBox([linked, answer]))
"""
_BOX_CELL = """
from moe_edu import lessons, load_pretrained
lessons.begin()
lessons.show(lessons.translate_box(load_pretrained(), text="quinta-feira, 1 de agosto de 1996"))
"""


class Redraw(NamedTuple):
    """Milliseconds from key press to redraw for one explorer, over the `presses` that changed its picture.

    `way` is "page" or "python".
    """

    name: str
    way: str
    median_ms: float
    slowest_ms: float
    presses: int


def measure_in_page(browser: Any, names: Sequence[str], presses: int) -> Iterator[Redraw]:
    """Press arrow keys on the first control of each explorer, back and forth, and time every redraw."""
    from moe_edu.explorers import get  # here, so that the command line starts without loading widgets

    page = browser.new_page(viewport={"width": 800, "height": 900})
    for name in names:
        page.set_content(f"<!doctype html><meta charset='utf-8'><body>{get(name).html()}</body>")
        page.wait_for_selector(_MOUNTED)
        page.evaluate(_WATCH, ".moe-x")
        page.locator(_CONTROL).first.focus()
        for press in range(presses):
            page.keyboard.press(_ARROWS[press % len(_ARROWS)])
        yield _summary(name, "page", page)


def measure_through_python(lab: Lab, names: Sequence[str], presses: int) -> Iterator[Redraw]:
    """The same for explorers whose new state goes to Python, which draws its answer, and for typing into the box."""
    for name in names:
        is_box = name == BOX
        with lab.run(_BOX_CELL if is_box else _LINKED_CELL.format(name=name)) as page:
            page.wait_for_selector(_ANSWER)
            page.locator(_BOX_CONTROL if is_box else _CONTROL).first.focus()
            page.evaluate(_WATCH, _ANSWER)
            keys = _LETTERS if is_box else _ARROWS
            for press in range(presses):
                _press_and_wait(page, keys[press % len(keys)])
            yield _summary(name, "python", page)


def _press_and_wait(page: Any, key: str) -> None:
    """Press and wait for the answer; a control at an end of its range gives none."""
    from playwright.sync_api import TimeoutError as NoAnswerError

    before = page.evaluate("window.times.length")
    page.keyboard.press(key)
    with contextlib.suppress(NoAnswerError):
        page.wait_for_function("before => window.times.length > before", arg=before, timeout=_ANSWER_MS)


def _summary(name: str, way: str, page: Any) -> Redraw:
    times = page.evaluate("window.times")
    if not times:
        raise RuntimeError(f"{name} ({way}) answered none of the key presses")
    return Redraw(name, way, statistics.median(times), max(times), len(times))


def explorers_svg(results: Iterable[Redraw], machine: Machine) -> str:
    """The picture: time from key press to redraw, in the page and through Python."""
    rows: dict[str, dict[str, Sample]] = {}
    for result in results:
        sample = Sample(result.median_ms, result.median_ms, result.slowest_ms)
        rows.setdefault(result.name, {})[result.way] = sample
    return dots_svg(
        "From key press to redraw",
        format_machine(machine),
        "milliseconds: median to slowest",
        [Row(name, samples) for name, samples in rows.items()],
    )


@click.command()
@click.option(
    "--presses", type=click.IntRange(4), default=60, show_default=True, help="Key presses per explorer."
)
@click.option("--only", multiple=True, help=f"Measure only this explorer, or {BOX}; may be repeated.")
@click.option("--python/--no-python", default=True, show_default=True, help="Also measure through Python.")
@json_option
@plot_option
def explorers(
    presses: int, only: tuple[str, ...], python: bool, json_path: Path | None, plot_path: Path | None
) -> None:
    """Time each explorer in the system's Chromium, from key press to redraw.

    First as it computes in the page; then linked to Python in a separate JupyterLab, together with the translation box.
    """
    advice = explain_missing()
    if advice is not None:
        raise click.ClickException(advice)
    from moe_edu.explorers import NAMES

    names = only or (*NAMES, BOX)
    unknown = set(names) - {*NAMES, BOX}
    if unknown:
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join((*NAMES, BOX))}")
    advice = explain_missing("jupyterlab")
    if python and advice is not None:
        click.echo(f"the way through Python is left out: {advice}")
    machine = this_machine()
    click.echo(format_machine(machine))
    results = []
    click.echo(f"{'explorer':18} {'way':8} {'median ms':>10} {'slowest ms':>11} {'redraws':>8}")
    try:
        with contextlib.ExitStack() as stack:
            browser = stack.enter_context(open_browser())
            measured = [measure_in_page(browser, [name for name in names if name != BOX], presses)]
            if python and advice is None:
                measured.append(
                    measure_through_python(stack.enter_context(open_lab(browser)), names, presses)
                )
            for result in itertools.chain(*measured):
                click.echo(
                    f"{result.name:18} {result.way:8} {result.median_ms:10.1f} {result.slowest_ms:11.1f} "
                    f"{result.presses:8}"
                )
                results.append(result)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    if json_path is not None:
        write_json(json_path, machine, results=[result._asdict() for result in results])
    if plot_path is not None:
        write_plot(plot_path, explorers_svg(results, machine))
