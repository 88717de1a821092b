"""A browser for the tests that need one; without one they are skipped, except on CI, where it has to be there."""

import os

import pytest

from moe_edu.browser import find_browser, open_browser


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
def browser():
    with open_browser() as browser:
        yield browser
