"""The JupyterLab of `moe-edu lab`: its sockets do not wait, and its server loads no PyTorch."""

import json
import re
import subprocess
import sys
from unittest.mock import create_autospec

import pytest
from click.testing import CliRunner
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler

from moe_edu import cli
from moe_edu.system.lab import lab_command
from moe_edu.system.prompt_lab import PromptConnection


def test_a_connection_does_not_wait_for_acknowledgements(monkeypatch):
    steps = []
    monkeypatch.setattr(ZMQChannelsWebsocketConnection, "connect", lambda self: steps.append("connected"))
    handler = create_autospec(KernelWebsocketHandler, instance=True)
    handler.set_nodelay.side_effect = lambda value: steps.append(("nodelay", value))
    PromptConnection(websocket_handler=handler).connect()
    assert steps == [("nodelay", True), "connected"]


def run(*arguments):
    return subprocess.run(arguments, capture_output=True, text=True, check=True)


def test_the_server_uses_that_connection():
    shown = json.loads(run(*lab_command(), "--show-config-json").stdout)
    assert shown["ServerApp"]["kernel_websocket_connection_class"] == "__main__.PromptConnection"


def test_the_server_loads_no_pytorch():
    python, file = lab_command()
    imported = run(python, "-X", "importtime", file, "--version").stderr
    assert "jupyterlab.labapp" in imported
    assert not re.search(r"\| +(moe_edu|torch)\b", imported)


@pytest.mark.parametrize("options", [(), ("--port", "9999", "--no-browser")])
def test_the_command_starts_it_on_the_first_lesson(monkeypatch, options):
    started = []
    monkeypatch.setattr(subprocess, "call", lambda command: started.append(command) or 0)
    assert CliRunner().invoke(cli.main, ["lab", *options]).exit_code == 0
    (command,) = started
    assert command[:2] == lab_command()
    assert command[0] == sys.executable
    assert "--LabApp.default_url=/lab/tree/00_start_here.ipynb" in command
    assert ("--port=9999" in command) == ("--no-browser" in command) == bool(options)


def test_outside_a_clone_it_opens_a_copy(monkeypatch, tmp_path):
    (tmp_path / "package" / "notebooks").mkdir(parents=True)
    (tmp_path / "package" / "notebooks" / "02_the_router.ipynb").touch()
    monkeypatch.setattr("moe_edu.system.notebooks._PACKAGE", tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(subprocess, "call", lambda command: started.append(command) or 0)
    done = CliRunner().invoke(cli.main, ["lab", "02_the_router.ipynb"])
    assert done.exit_code == 0, done.output
    assert f"--notebook-dir={tmp_path / 'moe_edu_lessons'}" in started[0]
    assert (tmp_path / "moe_edu_lessons" / "02_the_router.ipynb").is_file()


def test_an_unknown_lesson_is_answered_with_the_list_of_lessons():
    done = CliRunner().invoke(cli.main, ["lab", "02"])
    assert done.exit_code == 1
    assert "there is no lesson 02; the lessons are 00_start_here.ipynb, 01_" in done.output
