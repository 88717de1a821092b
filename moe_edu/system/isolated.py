"""A Jupyter server isolated from the user's own: its settings, data and kernels are in a temporary folder."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

_PLACES = {
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "IPYTHONDIR": "ipython",
}


class Served(NamedTuple):
    """A server's address, and the token that gives access to it."""

    address: str
    token: str


@contextmanager
def serve_apart(
    command: Sequence[str], home: Path, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Start a Jupyter server on `folder`; it and its kernels end with the context.

    Args:
        command: the command that starts it, such as `lab_command()`.
        home: the folder for its settings and its log.
        folder: the notebooks that it serves.
        environment: further environment variables.

    Raises:
        RuntimeError: the server did not start; the message holds what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    # Exposes the page's own commands, which callers use to run cells and to change the theme.
    arguments = ["--no-browser", "--allow-root", "--expose-app-in-browser", f"--port={port}"]
    arguments += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    arguments += [f"--IdentityProvider.token={token}"]
    places = {name: str(home / place) for name, place in _PLACES.items()}
    log = home / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, **places, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api", process, log)
        yield Served(address, token)
    finally:
        process.terminate()
        process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    while process.poll() is None:
        try:
            urlopen(address).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text('utf-8')}")
