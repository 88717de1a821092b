"""Every notebook has the form of a lesson and runs with other parameters; nbval compares outputs (Makefile)."""

import re
import statistics
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from moe_edu.exercises.cells import PREFIX, exercise_cells, solved
from moe_edu.exercises.registry import exercises_of
from moe_edu.lessons.execute import execute

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
TRAINING = ("07", "09")  # lessons that train for minutes: here a few steps show that they run
LESSON_07 = ROOT / "notebooks" / "07_train_a_multilingual_model.ipynb"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def cells(path, cell_type):
    return [cell for cell in read(path).cells if cell.cell_type == cell_type]


def outputs(path):
    return [output for cell in cells(path, "code") for output in cell.outputs]


def test_there_are_notebooks():
    assert LESSON_07 in NOTEBOOKS


@each_notebook
class TestForm:
    def test_is_valid(self, path):
        nbformat.validate(read(path))

    def test_ran_from_top_to_bottom(self, path):
        counts = [cell.execution_count for cell in cells(path, "code")]
        assert counts == list(range(1, len(counts) + 1))

    def test_has_no_errors_and_no_warnings(self, path):
        for output in outputs(path):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text

    def test_every_claim_holds(self, path):
        assert not [output.text for output in outputs(path) if "✗" in output.get("text", "")]

    def test_is_small(self, path):
        assert path.stat().st_size <= 300_000

    def test_holds_no_widget_state(self, path):
        assert "widgets" not in read(path).metadata
        assert "application/vnd.jupyter.widget-view+json" not in path.read_text("utf-8")

    def test_names_no_place_on_a_machine(self, path):
        assert not re.search(
            r"/(home|root|tmp|Users|usr|opt|work|mnt)/|[A-Z]:\\\\|site-packages", path.read_text("utf-8")
        )

    def test_prose_is_short(self, path):
        for cell in cells(path, "markdown"):
            if not cell.source.startswith("## References"):
                assert len(cell.source.split()) <= 60, cell.source

    def test_minutes_for_the_exercises_add_up(self, path):
        head = "\n".join(cell.source for cell in cells(path, "markdown")[:3])
        said = re.search(r"(\d+) for the exercises", head)
        exercises = exercises_of(path.name[:2]) if path.name[:2].isdigit() else ()
        if said is None:
            assert path.stem == "glossary"
        else:
            assert abs(int(said[1]) - sum(exercise.minutes for exercise in exercises)) <= 4

    def test_code_is_short(self, path):
        lengths = [len(cell.source.splitlines()) for cell in cells(path, "code")]
        assert max(lengths) <= 25
        assert statistics.median(lengths) <= 8

    def test_code_is_narrow(self, path):
        """A window 1280 pixels wide has room for 106 columns; tests/browser measures this."""
        lines = [line for cell in cells(path, "code") for line in cell.source.splitlines()]
        assert [line for line in lines if len(line) > 106] == []

    def test_headings_go_down_one_level_at_a_time(self, path):
        text = "\n".join(cell.source for cell in cells(path, "markdown"))
        levels = [len(marks) for marks in re.findall(r"^(#+) ", text, flags=re.MULTILINE)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(later <= earlier + 1 for earlier, later in pairwise(levels))

    def test_begins_and_ends_like_every_lesson(self, path):
        prose = [cell.source for cell in cells(path, "markdown")]
        title, objectives = prose[:2]
        assert title.startswith("# ")
        assert objectives.startswith("**Afterwards you can**")
        for heading in ("## Summary", "## Exercises", "## References"):
            assert any(text.startswith(heading) for text in prose)
        assert prose[-1].startswith("**Next:**")

    def test_links_open_this_very_notebook(self, path):
        repository = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"][
            "Repository"
        ]
        name = repository.removeprefix("https://github.com/")
        title, setup = read(path).cells[0].source, cells(path, "code")[0].source
        file = f"notebooks/{path.name}"
        assert f"(https://colab.research.google.com/github/{name}/blob/main/{file})" in title
        assert f"(https://mybinder.org/v2/gh/{name}/main?urlpath=lab/tree/{file})" in title
        assert f"git+{repository}\n" in setup

    def test_pictures_are_there(self, path):
        for cell in cells(path, "markdown"):
            for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", cell.source):
                assert (path.parent / image).is_file()

    def test_setup_is_short(self, path):
        setup = cells(path, "code")[0].source
        assert len(list(filter(None, setup.splitlines()))) <= 6
        assert "lessons.begin()" in setup

    def test_parameters_can_be_injected_and_are_checked(self, path):
        code = cells(path, "code")
        (place,) = (i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
        assert code[place].source.startswith("# Parameters\n")
        assert "lessons.check_parameters(In)" in code[place + 1].source

    def test_exercises_are_those_of_the_package(self, path):
        notebook = read(path)
        shown = [cell.source for cell in notebook.cells if cell.id.startswith(PREFIX)]
        assert shown == [cell.source for cell in exercise_cells(path.name[:2])]

    def test_cell_ids_are_names(self, path):
        assert all(re.fullmatch(r"[a-z][a-z0-9-]+", cell.id) for cell in read(path).cells)


# By day, nbval runs the others, and the browser tests type in the answers.
SOLVED = [
    pytest.param(path, marks=() if path.name.startswith(TRAINING) else pytest.mark.nightly, id=path.stem)
    for path in NOTEBOOKS
]


@pytest.mark.parametrize("path", SOLVED)
def test_runs_with_every_exercise_solved(path, monkeypatch):
    """In strict mode, a check raises unless the answer is right. nbval runs the notebooks without answers."""
    monkeypatch.setenv("MOE_EDU_STRICT", "1")
    notebook = solved(read(path), lesson=path.name[:2])
    for cell in notebook.cells:
        if path.name[:2] in TRAINING and "parameters" in cell.metadata.get("tags", []):
            cell.source += "\nfast, steps = True, 12"
    execute(notebook, path.parent)
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    for exercise in exercises_of(path.name[:2]):
        assert f"✓ {exercise.key} " in printed


class TestLesson07WithOtherParameters:
    def papermill(self, output, **parameters):
        command = [sys.executable, "-m", "papermill", str(LESSON_07), str(output), "--no-progress-bar"]
        for name, value in parameters.items():
            command += ["-y", f"{name}: {value}"]
        return subprocess.run(command, capture_output=True, text=True, cwd=output.parent)

    def test_runs(self, tmp_path):
        output = tmp_path / "out.ipynb"
        languages = "[deu_Latn, eng_Latn, tha_Thai]"
        done = self.papermill(
            output, fast=True, steps=12, experts=4, capacity_factor=0.5, languages=languages
        )
        assert done.returncode == 0, done.stderr
        text = output.read_text("utf-8")
        assert "Step 12 of 12" in text
        assert "German (deu_Latn)" in text
        assert "French (fra_Latn)" not in text

    def test_refuses_an_unknown_parameter(self, tmp_path):
        done = self.papermill(tmp_path / "out.ipynb", fast=True, capacity=0.5)
        assert done.returncode != 0
        assert "unknown parameter 'capacity'; did you mean capacity_factor?" in done.stderr

    def test_refuses_an_unknown_language(self, tmp_path):
        done = self.papermill(tmp_path / "out.ipynb", fast=True, languages="[eng_Latn, german]")
        assert done.returncode != 0
        assert "unknown language 'german'; did you mean deu_Latn (German)" in done.stderr
