"""A JupyterLab of its own in the browser: for measuring what goes from the page to Python and back."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from moe_edu.server import lab_command

_PATIENCE_MS = 120_000  # a busy machine takes long to start a server and a kernel
# So that neither the user's settings nor their running servers are touched.
_PLACES = {
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "IPYTHONDIR": "ipython",
}
_KERNEL = {"name": "python3", "display_name": "Python 3"}  # without it JupyterLab asks which
_IS_IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
_RUN = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"


class Lab:
    """A running server, and the browser that visits it."""

    def __init__(self, address: str, token: str, folder: Path, context: Any) -> None:
        self._address, self._token, self._folder, self._context = address, token, folder, context

    @contextmanager
    def run(self, source: str) -> Iterator[Any]:
        """The page of a notebook whose one cell, `source`, has run."""
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


def explain_missing_lab() -> str | None:
    """What to do where JupyterLab is not installed; None where it is."""
    return None if find_spec("jupyterlab") else 'install JupyterLab: pip install "moe-edu[lab]"'


@contextmanager
def open_lab(browser: Any) -> Iterator[Lab]:
    """Start JupyterLab as `moe-edu lab` does, in a temporary folder; ended, with its kernels, afterwards.

    Args:
        browser: Playwright's.

    Raises:
        RuntimeError: the server did not start; with what it printed.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, socket.socket() as free:
        folder = Path(home) / "notebooks"
        folder.mkdir()
        free.bind(("127.0.0.1", 0))
        port, token = free.getsockname()[1], secrets.token_hex(16)
        free.close()
        command = [
            *lab_command(),
            "--no-browser",
            "--allow-root",
            "--expose-app-in-browser",
        ]
        command += [f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
        command += [f"--IdentityProvider.token={token}"]
        command += [
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--LabApp.news_url=None",
        ]
        environ = os.environ | {name: str(Path(home) / place) for name, place in _PLACES.items()}
        log = Path(home) / "log"
        with log.open("w") as output:
            server = subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT)
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        address = f"http://127.0.0.1:{port}"
        try:
            _wait_for(f"{address}/api", server, log)
            yield Lab(address, token, folder, context)
        finally:
            context.close()
            server.terminate()
            server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    while server.poll() is None:
        try:
            urlopen(address).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text('utf-8')}")
