"""The system's Chromium through Playwright, for pictures, benchmarks and tests; no browser is ever downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--font-render-hinting=none",
)


def find_browser() -> str | None:
    """The path of Chromium or Chrome; None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Playwright browser, closed at the end.

    Raises:
        RuntimeError: no Chromium or Chrome on this machine, or no Playwright.
    """
    path = find_browser()
    if path is None:
        raise RuntimeError("no Chromium or Chrome: install one, for example with `apt-get install chromium`")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise RuntimeError(
            "Playwright, which controls the browser, is missing: run `pip install playwright`"
        ) from error

    # Chromium refuses its sandbox to root, the usual user in containers.
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    flags = [*_FLAGS, "--no-sandbox"] if is_root else [*_FLAGS]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        try:
            yield browser
        finally:
            browser.close()
