"""`moe-edu bench explorers`: from input to redraw, in a real browser, for the explorers that compute in the page."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import click

from moe_edu.browser import open_browser

# The browser stamps a key press as it comes in; the observer hears of the new picture. Both on the same clock.
_WATCH = """() => {
  window.times = [];
  let pressed = null;
  addEventListener("keydown", (event) => { pressed = event.timeStamp; }, true);
  new MutationObserver(() => {
    if (pressed !== null) window.times.push(performance.now() - pressed);
    pressed = null;
  }).observe(document.querySelector(".moe-x"),
    { subtree: true, childList: true, attributes: true, characterData: true });
}"""


class Redraw(NamedTuple):
    """Milliseconds from key press to redraw of one explorer over `presses` presses."""

    name: str
    median_ms: float
    slowest_ms: float
    presses: int


def measure_redraws(presses: int) -> list[Redraw]:
    """Press arrow keys on the first control of each explorer, back and forth, and time every redraw.

    Raises:
        RuntimeError: no browser on this machine.
    """
    from moe_edu.explorers import NAMES, get  # here: the command line starts faster without widgets

    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 800, "height": 900})
        return [_measure(page, name, get(name).html(), presses) for name in NAMES]


def _measure(page: Any, name: str, html: str, presses: int) -> Redraw:
    page.set_content(f"<!doctype html><meta charset='utf-8'><body>{html}</body>")
    page.wait_for_selector(".moe-x[data-mounted]")
    page.evaluate(_WATCH)
    page.locator(".moe-x input[type=range], .moe-x [role=slider], .moe-x select").first.focus()
    for press in range(presses):
        page.keyboard.press("ArrowRight" if press % 4 < 2 else "ArrowLeft")
    times = page.evaluate("window.times")
    return Redraw(name, statistics.median(times), max(times), len(times))


@click.command()
@click.option(
    "--presses", type=click.IntRange(4), default=60, show_default=True, help="Key presses an explorer."
)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Write JSON here."
)
def explorers(presses: int, output: Path | None) -> None:
    """Time each explorer in the system's Chromium, from key press to redraw."""
    results = measure_redraws(presses)
    click.echo(f"{'explorer':22} {'median ms':>10} {'slowest ms':>11} {'redraws':>8}")
    for name, median, slowest, redraws in results:
        click.echo(f"{name:22} {median:10.1f} {slowest:11.1f} {redraws:8}")
    if output is not None:
        output.write_text(
            json.dumps([result._asdict() for result in results], indent=2) + "\n", encoding="utf-8"
        )
