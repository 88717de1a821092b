"""Every notebook in JupyterLab: it runs to its end, is accessible, and checks the answers that are typed.

`make screenshots` writes pictures of all pages to build/screenshots/<notebook>/<theme>-<width>-<number>.png.
"""

import inspect
import math
from pathlib import Path

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect
from torch.nn import functional as F

from moe_edu.exercises.cells import PREFIX
from moe_edu.exercises.exercise import source_of
from moe_edu.exercises.judge import Verdict, judge
from moe_edu.exercises.registry import exercises_of

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
SCREENSHOTS = ROOT / "build" / "screenshots"
WIDTHS = (1280, 1920)
SLICE = 1600  # pixels of a window's height
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
SCROLLED = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer"
WRITTEN = [".jp-Notebook .jp-RenderedHTMLCommon", ".jp-Notebook .jp-OutputArea-output"]
# Finds elements whose right part is hidden or must be scrolled sideways to be read.
TOO_WIDE = """[...document.querySelectorAll(".jp-Notebook-cell *")]
  .filter((node) => node.checkVisibility() && getComputedStyle(node).overflowX !== "visible")
  .filter((node) => node.clientWidth > 1 && node.scrollWidth > node.clientWidth + 1)
  .map((node) => `${node.className}: ${node.scrollWidth} of ${node.clientWidth} px: ${node.innerText.slice(0, 120)}`)
"""

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
    """Take pictures of the whole notebook, from top to bottom."""
    panel = page.locator(SCROLLED)
    height, step = panel.evaluate("panel => [panel.scrollHeight, panel.clientHeight]")
    for top in range(0, height, step):
        panel.evaluate("(panel, top) => { panel.scrollTop = top; }", top)
        yield page.screenshot(clip=panel.bounding_box())


class TestAsDelivered:
    def test_runs_to_its_end(self, notebook):
        assert notebook.failures() == []
        assert notebook.complaints == []
        assert notebook.elsewhere == []

    @pytest.mark.screenshots
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

    def test_nothing_is_cut_at_a_laptops_width(self, notebook):
        notebook.page.set_viewport_size({"width": min(WIDTHS), "height": SLICE})
        settle(notebook.page)
        assert notebook.page.evaluate(TOO_WIDE) == []

    @each_theme
    def test_axe_finds_no_barrier(self, notebook, theme):
        show_in(notebook.page, theme)
        response = Axe().run(notebook.page, {"include": WRITTEN}).response
        assert response["passes"]
        found = [(rule["id"], node["html"]) for rule in response["violations"] for node in rule["nodes"]]
        assert found == []


class TestInUse:
    def test_explorers_follow_the_keyboard(self, notebook):
        for explorer in notebook.explorers():
            assert notebook.answers_to_a_key(explorer)
        assert notebook.complaints == []
        assert notebook.elsewhere == []

    def test_exercises_check_what_is_typed(self, notebook, name):
        ids = [cell["id"] for cell in notebook.cells()]
        for exercise in exercises_of(name[:2]):
            index = ids.index(f"{PREFIX}{exercise.key.replace('.', '-')}")
            cell = notebook.page.locator(f"{SCROLLED} .jp-Notebook-cell").nth(index)
            output = cell.locator(".jp-OutputArea-output")

            starter = judge(exercise, made(exercise.starter_source(), exercise.answer_name), 0)
            assert starter.outcome == "not attempted"
            expect_verdict(output, exercise, "○", starter)

            source, message = wrong_answer(exercise)
            type_and_run(notebook.page, cell, source)
            hint = f'For a hint: exercises.hint("{exercise.key}")'
            expect_verdict(output, exercise, "✗", Verdict("wrong", f"{message} {hint}"))

            source = exercise.cell_source().replace(exercise.starter_source(), exercise.solution_source(), 1)
            type_and_run(notebook.page, cell, source)
            expect_verdict(output, exercise, "✓", judge(exercise, exercise.solution, 0))
        assert notebook.complaints == []


@pytest.mark.parametrize("name", ["07_train_a_multilingual_model.ipynb"], indirect=True)
class TestLesson07:
    """Its figures, and its translation box."""

    def test_draws_its_figures(self, notebook):
        assert notebook.page.locator(".js-plotly-plot .scatterlayer .js-line").count() > 0
        assert notebook.page.locator(".js-plotly-plot .barlayer .point").count() > 0

    def test_typed_text_is_text_and_is_translated(self, notebook):
        notebook.page.get_by_label("Phrase", exact=True).fill("<b>7 mai 2001")
        # "<" is too rare to have its own token: it becomes a byte token.
        wait_for_tokens(notebook.page, "▁<0x3C>b<0x3E>7▁mai▁2001")
        answer = notebook.page.locator(".widget-html-content .moe").first
        assert answer.locator("b").count() == answer.locator(".moe-choice > b").count()
        assert answer.locator(".moe-answer").text_content()

    def test_a_language_can_be_chosen(self, notebook):
        notebook.page.get_by_label("From", exact=True).select_option(label="fra_Latn: French")
        wait_for_tokens(notebook.page, "fra_Latn")
        assert notebook.page.locator(".widget-html-content .moe .moe-answer").first.text_content()
        assert notebook.complaints == []


def wait_for_tokens(page, text):
    """Wait until the chips of the box's answer spell `text`, `▁` standing for a space."""
    page.wait_for_function(
        "text => [...document.querySelectorAll('.widget-html-content .moe-token')]"
        ".map(token => token.textContent).join('').includes(text)",
        arg=text,
    )


def expect_verdict(output, exercise, sign, verdict):
    """Wait until a cell's output says `verdict`, as `exercises.check` prints it."""
    text = f"{sign} {exercise.key} {exercise.title} – {verdict.outcome}. {verdict.message}"
    expect(output).to_have_text(text)


def made(source, name):
    """The object that `source` defines as `name`, in a namespace like a notebook's."""
    namespace = {"torch": torch, "Tensor": torch.Tensor, "math": math, "F": F}
    exec(compile(source, f"<{name}>", "exec"), namespace)
    return namespace[name]


def wrong_answer(exercise):
    """A cell with a typical wrong answer, and the message that refuses it.

    The answer is typed if it needs only what the notebook defines; otherwise it is taken from the exercise.
    """
    mistake = next(filter(can_be_typed, exercise.mistakes), exercise.mistakes[0])
    if exercise.is_question:
        return f"answer = {mistake.answer!r}\n{check_of(exercise, 'answer')}", mistake.message
    if can_be_typed(mistake):
        name = mistake.answer.__name__
        return f"{source_of(mistake.answer)}\n\n\n{check_of(exercise, name)}", mistake.message
    lines = (
        "from moe_edu.exercises.registry import find_exercise",
        f'answer = find_exercise("{exercise.key}").mistakes[0].answer',
        check_of(exercise, "answer"),
    )
    return "\n".join(lines), mistake.message


def can_be_typed(mistake):
    """Whether it is a named function that calls no other function of ours."""
    if not inspect.isfunction(mistake.answer) or mistake.answer.__name__ == "<lambda>":
        return False
    return set(inspect.getclosurevars(mistake.answer).globals) <= {"torch", "math", "F"}


def check_of(exercise, answer):
    return f'exercises.check("{exercise.key}", {answer})'


def type_and_run(page, cell, source):
    """Replace a cell's contents, as a reader does, and run it."""
    cell.locator(".cm-content").click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(source)
    page.keyboard.press("Shift+Enter")
