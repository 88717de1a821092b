"""Every notebook in JupyterLab: it runs to its end, is drawn, can be read by everyone, and judges what is typed.

Pictures of all pages are written to build/screenshots/<notebook>/<theme>-<width>-<number>.png for people to look at.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
SCREENSHOTS = ROOT / "build" / "screenshots"
WIDTHS = (1280, 1920)
SLICE = 1600  # pixels of a window's height
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
SCROLLED = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer"
WRITTEN = [".jp-Notebook .jp-RenderedHTMLCommon", ".jp-Notebook .jp-OutputArea-output"]

pytestmark = pytest.mark.browser
each_theme = pytest.mark.parametrize("theme", THEMES)


@pytest.fixture(scope="module", params=NAMES, ids=lambda name: Path(name).stem)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def notebook(jupyterlab, name):
    with jupyterlab.run(name) as notebook:
        yield notebook


def show_in(page, theme):
    page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", THEMES[theme])
    page.wait_for_selector(f"body[data-jp-theme-name='{THEMES[theme]}']", state="attached")


def settle(page):
    """Wait until the page keeps its height for ten frames."""
    page.locator(SCROLLED).evaluate(
        """async (panel) => {
          for (let height = -1, same = 0; same < 10; same = panel.scrollHeight === height ? same + 1 : 0) {
            height = panel.scrollHeight;
            await new Promise(requestAnimationFrame);
          }
        }"""
    )


def slices(page):
    """Pictures of the whole notebook, from top to bottom."""
    panel = page.locator(SCROLLED)
    height, step = panel.evaluate("panel => [panel.scrollHeight, panel.clientHeight]")
    for top in range(0, height, step):
        panel.evaluate("(panel, top) => { panel.scrollTop = top; }", top)
        yield page.screenshot(clip=panel.bounding_box())


class TestAsDelivered:
    def test_runs_to_its_end(self, notebook):
        assert notebook.ran_to_its_end()
        assert notebook.complaints == []
        assert notebook.elsewhere == []

    @each_theme
    def test_is_drawn(self, notebook, name, theme):
        folder = SCREENSHOTS / Path(name).stem
        folder.mkdir(parents=True, exist_ok=True)
        page = notebook.page
        show_in(page, theme)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": SLICE})
            settle(page)
            for old in folder.glob(f"{theme}-{width}-*"):
                old.unlink()
            for number, picture in enumerate(slices(page), start=1):
                (folder / f"{theme}-{width}-{number:02}.png").write_bytes(picture)
        assert notebook.complaints == []
