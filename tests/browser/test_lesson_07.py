"""Lesson 07 in JupyterLab and the system's Chromium: it runs, and the box answers what is typed."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PATIENCE_MS = 120_000  # for a machine that others use, too

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab with its token, its files, settings and kernels apart from the user's own."""
    home = tmp_path_factory.mktemp("lab")
    folder = home / "notebooks"
    shutil.copytree(NOTEBOOKS / "images", folder / "images")
    notebook = nbformat.read(NOTEBOOKS / "07_train_a_multilingual_model.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\nfast = True\nsteps = 12"
    nbformat.write(notebook, folder / "lesson.ipynb")

    news = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}), encoding="utf-8")
    places = {"SETTINGS_DIR": "settings", "WORKSPACES_DIR": "workspaces"}
    environment = {
        **os.environ,
        **{f"JUPYTERLAB_{name}": str(home / place) for name, place in places.items()},
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.port_retries=0",
    ]
    command += [f"--port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api", server)
        yield f"{address}/lab/workspaces/lesson-07/tree/lesson.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait()


def wait_for(address, server):
    while server.poll() is None:
        try:
            urlopen(address).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail("JupyterLab did not start")


@pytest.fixture(scope="module")
def page(browser, lab):
    """The lesson, run to its end, and what the page complained of meanwhile in `page.complaints`."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE_MS)
    page.complaints = []
    page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(lab)
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle")
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    # The last cell shows its number once everything above has run.
    page.wait_for_function(
        "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
        ".every(prompt => /^\\[\\d+\\]:$/.test(prompt.textContent.trim()))"
    )
    yield page
    page.close()


def wait_for_tokens(page, text):
    """Wait until the chips of the box's answer spell `text`, `▁` standing for a space."""
    page.wait_for_function(
        "text => [...document.querySelectorAll('.widget-html-content .moe-token')]"
        ".map(token => token.textContent).join('').includes(text)",
        arg=text,
    )


@pytest.fixture
def answer(page):
    """The box's answer, below its controls."""
    return page.locator(".widget-html-content .moe").first


def test_runs_without_an_error(page):
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert page.complaints == []


def test_draws_its_figures(page):
    assert page.locator(".js-plotly-plot .scatterlayer .js-line").count() > 0
    assert page.locator(".js-plotly-plot .barlayer .point").count() > 0


def test_typed_text_is_text_and_is_translated(page, answer):
    page.get_by_label("Phrase", exact=True).fill("<b>7 mai 2001")
    # "<" is too rare to have a token of its own: it is spelled as a byte.
    wait_for_tokens(page, "▁<0x3C>b<0x3E>7▁mai▁2001")
    assert answer.locator("b").count() == answer.locator(".moe-choice > b").count()
    assert answer.locator(".moe-answer").text_content()


def test_a_language_is_chosen(page, answer):
    page.get_by_label("From", exact=True).select_option(label="fra_Latn: French")
    wait_for_tokens(page, "fra_Latn")
    assert answer.locator(".moe-answer").text_content()
