"""A separate JupyterLab in the browser, to measure round trips from the page to Python and back."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_edu.system.isolated import serve_apart
from moe_edu.system.lab import lab_command

_PATIENCE_MS = 120_000  # a busy machine needs a long time to start a server and a kernel
_KERNEL = {"name": "python3", "display_name": "Python 3"}  # without it JupyterLab asks for a kernel
_IS_IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
_RUN = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"


class Lab:
    """A running server and the browser that visits it."""

    def __init__(self, address: str, token: str, folder: Path, context: Any) -> None:
        self._address, self._token, self._folder, self._context = address, token, folder, context

    @contextmanager
    def run(self, source: str) -> Iterator[Any]:
        """The page of a notebook whose only cell, `source`, has run."""
        import nbformat  # here: it comes with JupyterLab, which the other benchmarks do without
        from nbformat.v4 import new_code_cell, new_notebook

        name = secrets.token_hex(4)
        notebook = new_notebook(cells=[new_code_cell(source)], metadata={"kernelspec": _KERNEL})
        nbformat.write(notebook, self._folder / f"{name}.ipynb")
        page = self._context.new_page()
        page.set_default_timeout(_PATIENCE_MS)
        page.goto(f"{self._address}/lab/workspaces/{name}/tree/{name}.ipynb?token={self._token}")
        page.wait_for_function(_IS_IDLE)
        page.evaluate(_RUN)
        page.wait_for_function(_IS_IDLE)
        try:
            yield page
        finally:
            page.evaluate("() => window.jupyterapp.commands.execute('kernelmenu:shutdown')")
            page.close()


@contextmanager
def open_lab(browser: Any) -> Iterator[Lab]:
    """Start JupyterLab as `moe-edu lab` does, in a temporary folder; stop it and its kernels afterwards.

    Args:
        browser: Playwright's.

    Raises:
        RuntimeError: the server did not start; the message has its output.
    """
    quiet = ("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        folder = Path(home) / "notebooks"
        folder.mkdir()
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        try:
            with serve_apart([*lab_command(), *quiet], Path(home), folder) as server:
                yield Lab(server.address, server.token, folder, context)
        finally:
            context.close()
