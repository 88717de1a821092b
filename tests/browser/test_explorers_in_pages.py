"""Explorers in a page without a kernel: they compute the same as Python, and respond to keyboard and mouse."""

import json
import random
import re

import pytest

from moe_edu import explorers
from moe_edu.explorers.explorer import STATIC, Grid, Slider, bundle
from moe_edu.explorers.pictures import draw_picture

pytestmark = pytest.mark.browser

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")

each_explorer = pytest.mark.parametrize("name", explorers.NAMES)
RANDOM_STATES = 60


@pytest.fixture(scope="module")
def page(browser, patience_ms):
    page = browser.new_page(viewport={"width": 800, "height": 900})
    page.set_default_timeout(patience_ms)
    yield page
    page.close()


@pytest.fixture
def opened(page, request, tmp_path):
    """The explorer's HTML, opened from disk; `page.complaints` and `page.requests` record what should not happen."""
    name = request.node.callspec.params["name"]
    file = tmp_path / "page.html"
    file.write_text(
        f"<!doctype html><meta charset='utf-8'><body>{explorers.get(name).html()}</body>", "utf-8"
    )
    page.complaints, page.requests = [], []
    listeners = {
        "console": lambda message: message.type == "error" and page.complaints.append(message.text),
        "pageerror": lambda error: page.complaints.append(str(error)),
        "request": lambda request: page.requests.append(request.url),
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    page.goto(file.as_uri())
    page.wait_for_selector(".moe-x[data-mounted]")
    yield page
    for event, listener in listeners.items():
        page.remove_listener(event, listener)


def close(ours, theirs):
    """Whether two JSON values are equal up to rounding."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(close(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    if isinstance(ours, float) or isinstance(theirs, float):
        return ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    return ours == theirs


@each_explorer
class TestInAPage:
    def test_computes_the_same_as_python(self, page, name):
        explorer = explorers.get(name)
        rng = random.Random(name)
        states = [explorer.state(), *(explorer.random_state(rng) for _ in range(RANDOM_STATES))]
        states += [explorer.state(**changes) for changes in explorer.solutions]
        script = (
            f"([states, data]) => {{ {bundle(name)}\nreturn states.map(s => explorer.compute(s, data)); }}"
        )
        theirs = page.evaluate(script, [states, explorer.spec()["data"]])
        for state, view in zip(states, theirs, strict=True):
            ours = json.loads(json.dumps(explorer.view(state)))
            assert close(ours, view), (state, ours, view)

    def test_opens_without_complaints_or_requests(self, opened, name):
        assert opened.complaints == []
        assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
        assert (
            opened.locator(".moe-x-sentence").inner_text()
            == explorers.get(name).view(explorers.get(name).state())["sentence"]
        )

    def test_every_control_has_a_name(self, opened, name):
        for control in opened.locator("input, select, [role=slider], [role=button]").all():
            named = control.evaluate(
                "e => e.getAttribute('aria-label') || e.closest('label')?.textContent.trim()"
            )
            assert named

    def test_sliders_follow_the_keyboard(self, opened, name):
        for field in explorers.get(name).fields:
            if isinstance(field, Slider):
                slider = opened.locator(f"[data-field={field.name}]")
                slider.press("End")
                assert float(slider.input_value()) == pytest.approx(field.high)
                slider.press("Home")
                assert float(slider.input_value()) == pytest.approx(field.low)
        assert opened.complaints == []

    def test_handles_follow_keyboard_and_mouse_and_keep_the_focus(self, opened, name):
        if not any(isinstance(field, Grid) for field in explorers.get(name).fields):
            pytest.skip("nothing is moved on this stage")
        handle = opened.locator("[role=slider]").first

        def value():
            return float(handle.get_attribute("aria-valuenow"))

        handle.focus()
        start = value()
        opened.keyboard.press("ArrowDown")
        lower = value()
        assert lower < start
        assert handle.evaluate("e => e === document.activeElement")
        opened.keyboard.press("Home")
        lowest = value()
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        opened.mouse.move(x, y)
        opened.mouse.down()
        opened.mouse.move(x + 20, y - 10, steps=3)
        opened.mouse.up()
        assert value() > lowest

    def test_the_handle_that_is_moved_stays_the_same_one(self, opened, name):
        if not any(isinstance(field, Grid) for field in explorers.get(name).fields):
            pytest.skip("nothing is moved on this stage")
        for label in [handle.get_attribute("aria-label") for handle in opened.locator("[role=slider]").all()]:
            handle = opened.locator(f"[role=slider][aria-label='{label}']")
            handle.focus()
            for key, end in (("Home", "aria-valuemin"), ("End", "aria-valuemax")):
                opened.keyboard.press(key)
                assert opened.evaluate("document.activeElement.getAttribute('aria-label')") == label
                assert handle.get_attribute("aria-valuenow") == handle.get_attribute(end)

    def test_reset_brings_back_the_first_state(self, opened, name):
        before = opened.locator(".moe-x").inner_html()
        for changes in explorers.get(name).solutions:
            for field, value in changes.items():
                control = opened.locator(f"[data-field={field}]")
                if control.count() and control.evaluate("e => e.tagName") == "SELECT":
                    control.select_option(str(value))
        opened.get_by_role("button", name="Reset").click()
        assert opened.locator(".moe-x").inner_html() == before

    def test_fits_a_narrow_column(self, opened, name):
        opened.set_viewport_size({"width": 376, "height": 900})
        try:
            assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        finally:
            opened.set_viewport_size({"width": 800, "height": 900})

    def test_its_saved_picture_is_what_it_draws(self, page, name):
        stored = (STATIC / "pictures" / f"{name}.svg").read_text("utf-8")
        drawn = draw_picture(page, name)
        # Browsers and processors disagree in the last digits of an exponential.
        assert NUMBER.split(stored) == NUMBER.split(drawn)
        numbers = ([float(number) for number in NUMBER.findall(svg)] for svg in (stored, drawn))
        assert next(numbers) == pytest.approx(next(numbers), abs=1e-6)


def test_hatching_does_not_depend_on_another_explorer(page, tmp_path):
    """A pattern in a hidden tab paints nothing, and an id refers to the first element that has it."""
    queue = explorers.get("capacity_queue").html()
    file = tmp_path / "page.html"
    file.write_text(
        f"<!doctype html><meta charset='utf-8'><body><div hidden>{queue}</div>{queue}</body>", "utf-8"
    )
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelectorAll('.moe-x[data-mounted]').length === 2")
    (hidden_fill, hidden), (fill, own) = page.locator(".moe-x svg").evaluate_all(
        "all => all.map(svg => [getComputedStyle(svg.querySelector('.dropped')).fill, svg.querySelector('pattern').id])"
    )
    assert hidden != own
    assert f"#{hidden}" in hidden_fill
    assert f"#{own}" in fill
