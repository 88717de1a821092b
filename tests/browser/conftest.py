"""A browser, and Jupyter servers with the notebooks, for the tests that need them.

Without a browser these tests are skipped, except on CI, which must have one.
"""

import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import nbformat
import pytest
from playwright.sync_api import expect

from moe_edu.system.browser import find_browser, open_browser
from moe_edu.system.isolated import serve_apart

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PATIENCE_MS = 120_000  # long enough for a shared machine
TRAINING = ("07_", "09_")  # these train for minutes, or briefly with the parameters below
SHORT = "\nfast = True\nsteps = 12"
LAB_SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # Draw every cell, in view or not, so that pictures can show the whole page.
    "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
}
# Notebook 7 sometimes reads a setting before it exists (jupyter/notebook issue 7862), even without any cell of ours.
NOT_OURS = ("Cannot read properties of undefined (reading 'schema')",)
EXPLORER = ".jp-OutputArea-output .moe-x[data-mounted=true]"
PANEL = "window.jupyterapp?.shell.currentWidget"


def pytest_collection_modifyitems(items):
    # On CI a skipped test would look like a passed one.
    if find_browser() is not None or os.environ.get("CI"):
        return
    skip = pytest.mark.skip(
        reason="no Chromium or Chrome: install one, for example with `apt-get install chromium`"
    )
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def patience_ms():
    return PATIENCE_MS


@pytest.fixture(scope="session")
def browser():
    expect.set_options(timeout=PATIENCE_MS)
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def jupyterlab(browser, tmp_path_factory):
    """A separate JupyterLab; all its pages share a workspace folder, so each notebook has its own workspace."""
    home = tmp_path_factory.mktemp("lab")
    with serve("jupyterlab", LAB_SETTINGS, home) as server, pages_of(browser) as context:
        yield Jupyter(server, "lab/workspaces/{stem}/tree/{name}", context)


@pytest.fixture(scope="session")
def notebook_7(browser, tmp_path_factory):
    """A separate Notebook 7, with its default settings."""
    home = tmp_path_factory.mktemp("notebook")
    with serve("notebook", {}, home) as server, pages_of(browser) as context:
        yield Jupyter(server, "notebooks/{name}", context)


@dataclass(frozen=True)
class Server:
    """A Jupyter server's address, its access token, and the file of solved exercises."""

    address: str
    token: str
    progress: Path

    def end_kernels(self):
        for session in self._ask("GET", ""):
            self._ask("DELETE", session["id"])

    def _ask(self, method, session):
        request = Request(f"{self.address}/api/sessions/{session}", method=method)
        request.add_header("Authorization", f"token {self.token}")
        with urlopen(request) as response:
            return json.loads(response.read() or "null")


@dataclass(frozen=True)
class Jupyter:
    """A server and its pages, which share one browser context and thus its cache."""

    server: Server
    route: str
    context: Any

    @contextmanager
    def run(self, name):
        """The notebook `name`, run to its end or its first error by a reader who has solved nothing yet.

        Afterwards its page is closed and its kernel is ended.
        """
        self.server.progress.unlink(missing_ok=True)
        page = self.context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        notebook = RunNotebook(page)
        allowed = (self.server.address, self.server.address.replace("http", "ws", 1), "data:", "blob:")
        notebook.listen(allowed)
        path = self.route.format(name=name, stem=Path(name).stem)
        try:
            page.goto(f"{self.server.address}/{path}?token={self.server.token}")
            page.wait_for_function(f"{PANEL}?.sessionContext?.session?.kernel?.status === 'idle'")
            page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
            yield notebook
        finally:
            page.close()
            self.server.end_kernels()


@dataclass
class RunNotebook:
    """A notebook in a page.

    Attributes:
        complaints: errors of the page and of its console.
        elsewhere: addresses outside this machine that the page requested.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def listen(self, allowed):
        """Record complaints, and requests to addresses that begin with none of `allowed`."""

        def complain(text):
            if text not in NOT_OURS:
                self.complaints.append(text)

        def look_at(request):
            if not request.url.startswith(allowed):
                self.elsewhere.append(request.url)

        self.page.on("console", lambda message: message.type == "error" and complain(message.text))
        self.page.on("pageerror", lambda error: complain(str(error)))
        self.page.on("request", look_at)
        self.page.on("websocket", look_at)

    def cells(self):
        """The notebook's cells as they would now be saved."""
        return self.page.evaluate(f"[...{PANEL}.model.cells].map(cell => cell.toJSON())")

    def failures(self):
        """The errors in the notebook, and the code cells that did not run."""
        found = []
        for number, cell in enumerate(self.cells(), start=1):
            if cell["cell_type"] != "code" or not cell["source"]:
                continue
            if not cell["execution_count"]:
                found.append(f"cell {number} did not run")
            for output in cell["outputs"]:
                if output["output_type"] == "error":
                    found.append(f"cell {number}: {output['ename']}: {output['evalue']}")
        return found

    def explorers(self):
        """The explorers in the page, once all those that its cells show are ready."""
        source = "\n".join("".join(cell["source"]) for cell in self.cells() if cell["cell_type"] == "code")
        alive = self.page.locator(EXPLORER)
        expect(alive).to_have_count(len(re.findall(r"explorers\.(?:show|get)\(", source)))
        return alive.all()

    def answers_to_a_key(self, explorer):
        """Whether an arrow key, although a shortcut of the notebook, changes the explorer and not the active cell."""
        explorer.locator("input[type=range], select, [role=slider]").first.focus()
        before, active = explorer.inner_html(), self._active_cell()
        self.page.keyboard.press("ArrowDown")
        if explorer.inner_html() == before:  # the control was at its lower end, or at its last option
            self.page.keyboard.press("ArrowUp")
        return explorer.inner_html() != before and self._active_cell() == active

    def _active_cell(self):
        return self.page.evaluate(f"{PANEL}.content.activeCellIndex")


@contextmanager
def pages_of(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        yield context
    finally:
        context.close()


@contextmanager
def serve(module, settings, home):
    """Start `python -m module` on copies of the notebooks, with separate files, settings and kernels."""
    folder = home / "notebooks"
    copy_notebooks(folder)
    for name, values in settings.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    progress = home / "progress.json"
    command = [sys.executable, "-m", module]
    with serve_apart(command, home, folder, {"MOE_EDU_PROGRESS": str(progress)}) as served:
        yield Server(*served, progress)


def copy_notebooks(folder):
    """Copy the notebooks without their outputs, so that a page shows only what it computed itself."""
    shutil.copytree(NOTEBOOKS / "images", folder / "images")
    for path in NOTEBOOKS.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            if path.name.startswith(TRAINING) and "parameters" in cell.metadata.get("tags", []):
                cell.source += SHORT
        nbformat.write(notebook, folder / path.name)
