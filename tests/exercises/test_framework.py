"""How answers are judged, guarded, recorded and put into notebooks."""

import json
import os
import re
import sys
import time
from dataclasses import replace

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from moe_edu import exercises
from moe_edu.exercises import progress, sandbox
from moe_edu.exercises.cells import exercise_cells, solved, with_exercises
from moe_edu.exercises.compare import compare
from moe_edu.exercises.exercise import Exercise, Mistake
from moe_edu.exercises.judge import Verdict, judge
from moe_edu.exercises.registry import find_exercise


def double(x):
    """x [N] to [N]: twice the values."""
    return 2 * x


def triple(x):
    """The published code."""
    return 3 * x


FUNCTION = Exercise(
    key="02.9",
    title="Double",
    task="Write it.",
    difficulty="easy",
    importance="helpful",
    minutes=1,
    solution=double,
    draw=lambda generator: (torch.rand(4, generator=generator),),
    mistakes=(Mistake(lambda x: x, "Once is not twice."), Mistake(lambda x: x * x, "That is the square.")),
    hints=("Add it to itself.", "Multiply by 2."),
)
QUESTION = Exercise(
    key="02.8",
    title="How many",
    task="Count.",
    difficulty="easy",
    importance="helpful",
    minutes=1,
    solution=128,
    mistakes=(Mistake(2, "Those are the chosen ones."), Mistake(127, "Count from 1.")),
    hints=("Look.", "Look again."),
)
BUG = Exercise(
    key="02.7",
    title="Fix it",
    task="Fix.",
    difficulty="hard",
    importance="important",
    minutes=5,
    solution=double,
    draw=FUNCTION.draw,
    starter=triple,
    mistakes=FUNCTION.mistakes,
    hints=FUNCTION.hints,
    origin="a library 1.0",
)


@pytest.fixture(autouse=True)
def progress_file(tmp_path, monkeypatch):
    file = tmp_path / "home" / "progress.json"
    monkeypatch.setenv(progress.FILE_VARIABLE, str(file))
    return file


class TestJudge:
    def test_right(self):
        assert judge(FUNCTION, lambda x: x + x, 0) == ("right", "Checked on 20 random inputs.")

    def test_mistakes_get_their_message(self):
        assert judge(FUNCTION, lambda x: x * x, 0) == ("wrong", "That is the square.")

    def test_other_wrong_answers_get_the_share_that_is_right(self):
        verdict = judge(FUNCTION, lambda x: torch.cat([2 * x[:3], x[3:]]), 0)
        assert verdict.outcome == "wrong"
        assert verdict.message == (
            "The shapes are right, but only 75% of the values are. Your function is right on 0 of 20 random inputs."
        )

    def test_no_right_value_is_none(self):
        assert "but none of the values are." in judge(FUNCTION, lambda x: -x, 0).message

    def test_shapes_come_first(self):
        verdict = judge(FUNCTION, lambda x: 2 * x[:2], 0)
        assert verdict == ("wrong", "The result has shape [2] instead of [4].")

    def test_types_are_named(self):
        verdict = judge(FUNCTION, lambda x: 2.0, 0)
        assert verdict == ("wrong", "The result should be a float32 tensor of shape [4], not a float.")

    def test_an_error_names_its_line_and_the_inputs(self):
        def answer(x):
            return x @ torch.ones(3)

        verdict = judge(FUNCTION, answer, 0)
        assert verdict.outcome == "error"
        assert 'RuntimeError in the line "return x @ torch.ones(3)"' in verdict.message
        assert "Inputs: a float32 tensor of shape [4]." in verdict.message

    def test_a_forgotten_return(self):
        def answer(x):
            x = 2 * x

        assert judge(FUNCTION, answer, 0) == (
            "wrong",
            "Your function returns None: does it end with `return`?",
        )

    def test_changed_inputs_are_refused(self):
        verdict = judge(FUNCTION, lambda x: x.mul_(2), 0)
        assert verdict == (
            "wrong",
            "The values are right, but your function changes its inputs. Work on a copy.",
        )

    def test_changed_inputs_are_found_in_lists_and_dictionaries(self):
        def solution(xs, named):
            return [2 * x for x in xs]

        def spoil_list(xs, named):
            return [x.mul_(2) for x in xs]

        def spoil_dictionary(xs, named):
            named.pop("y")
            return solution(xs, named)

        exercise = replace(
            FUNCTION, solution=solution, draw=lambda g: ([torch.ones(2)], {"y": torch.ones(1)})
        )
        assert judge(exercise, solution, 0).outcome == "right"

        def empty_list(xs, named):
            result = solution(xs, named)
            xs[0] = None
            return result

        for answer in (spoil_list, spoil_dictionary, empty_list):
            assert "changes its inputs" in judge(exercise, answer, 0).message

    @pytest.mark.parametrize("answer", [None, ...])
    def test_nothing_is_not_attempted(self, answer):
        assert judge(FUNCTION, answer, 0).outcome == "not attempted"
        assert judge(QUESTION, answer, 0).outcome == "not attempted"

    def test_not_implemented_is_not_attempted(self):
        def answer(x):
            raise NotImplementedError

        assert judge(FUNCTION, answer, 0).outcome == "not attempted"

    def test_a_result_instead_of_the_function(self):
        assert "Pass the function double itself" in judge(FUNCTION, 3, 0).message

    def test_published_code_is_not_attempted_until_it_changes(self):
        assert judge(BUG, lambda x: x * 3, 0).outcome == "not attempted"
        assert judge(BUG, lambda x: x * 2, 0).outcome == "right"

    def test_questions(self):
        assert judge(QUESTION, 128, 0).outcome == "right"
        assert judge(QUESTION, torch.tensor(128), 0).outcome == "right"
        assert judge(QUESTION, 127, 0) == ("wrong", "Count from 1.")
        assert judge(QUESTION, 5, 0) == ("wrong", "5 is not the answer.")
        assert judge(QUESTION, "many", 0) == ("wrong", "Your answer should be a number, not a str.")


class TestCompare:
    @pytest.mark.parametrize(
        ("got", "expected", "right", "total"),
        [
            (1.00001, 1.0, 1, 1),
            ((1, 2), (1, 3), 1, 2),
            (torch.tensor([1, 2]), [1, 2], 2, 2),
            ({"a": 1.0}, {"a": 1.0}, 1, 1),
            (torch.tensor(float("nan")), torch.tensor(float("nan")), 1, 1),
            ("a", "a", 1, 1),
        ],
    )
    def test_counts_what_agrees(self, got, expected, right, total):
        assert compare(got, expected, 1e-3) == (right, total, "")

    @pytest.mark.parametrize(
        ("got", "expected", "problem"),
        [
            (True, 1, "should be a number, not a bool"),
            ([1], (1, 2), "should hold 2 values, not be a list of length 1"),
            ({"b": 1}, {"a": 1}, "should be a dictionary with the keys a"),
            ((1, torch.ones(7)), (1, torch.ones(8)), "result[1] has shape [7] instead of [8]"),
            (torch.zeros(2), torch.zeros(2, dtype=torch.bool), "should be a bool tensor of shape [2]"),
            (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "should be an int64 tensor of shape [2]"),
            (torch.eye(2).to_sparse(), torch.eye(2), "should be a dense tensor, not torch.sparse_coo"),
            (None, "a", "should be a str, not a NoneType"),
        ],
    )
    def test_says_what_is_wrong(self, got, expected, problem):
        assert problem in compare(got, expected, 1e-3).problem


class TestSandbox:
    def test_an_endless_loop_is_stopped(self):
        def check():
            while True:
                pass

        start = time.monotonic()
        report = sandbox.run_guarded(check, 0.5)
        assert report.verdict.outcome == "error"
        assert "stopped after 0.5 seconds" in report.verdict.message
        assert time.monotonic() - start < 30

    def test_a_thread_that_is_late_takes_no_output_with_it(self, capsys):
        """Where there is no fork, the lesson can still print while the late thread runs and after it ends."""
        before = sys.stdout
        for _ in range(2):
            report = sandbox._in_thread(lambda: time.sleep(0.3) or Verdict("right", ""), 0.05)
            assert report.verdict.outcome == "error"
            assert sys.stdout is before
        print("the lesson goes on")
        time.sleep(0.5)
        assert sys.stdout is before
        assert capsys.readouterr().out == "the lesson goes on\n"

    def test_an_endless_loop_is_stopped_in_a_thread(self):
        def check():
            while True:
                pass

        assert "stopped after 0.2 seconds" in sandbox._in_thread(check, 0.2).verdict.message

    @pytest.mark.skipif(sys.platform != "linux", reason="without a separate process a crash ends the tests")
    def test_a_crash_is_reported(self):
        verdict = sandbox.run_guarded(lambda: os.abort(), 10).verdict
        assert verdict == (
            "error",
            "Your code ended the Python process (signal 6). The lesson is not affected.",
        )

    @pytest.mark.skipif(sys.platform != "linux", reason="threads have no memory limit of their own")
    def test_memory_is_limited(self):
        verdict = sandbox.run_guarded(lambda: Verdict("right", str(len(bytearray(2**40)))), 10).verdict
        assert verdict == ("error", "Your code asked for more memory than is available.")

    def test_endless_recursion_is_reported(self):
        def check():
            return check()

        assert "calls itself endlessly" in sandbox.run_guarded(check, 20).verdict.message

    @pytest.mark.parametrize("run", [sandbox.run_guarded, sandbox._in_thread])
    def test_what_is_printed_comes_back(self, run):
        def check():
            print("looking")
            return Verdict("right", "Right.")

        assert run(check, 10) == (Verdict("right", "Right."), "looking\n")

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux runs a separate process")
    def test_no_process_is_left(self, monkeypatch):
        children, fork = [], os.fork

        def remember():
            children.append(fork())
            return children[-1]

        monkeypatch.setattr(os, "fork", remember)
        sandbox.run_guarded(lambda: Verdict("right", ""), 10)
        (child,) = children
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


class TestCommands:
    def test_check_prints_the_verdict(self, capsys):
        exercises.check("02.1", find_exercise("02.1").solution)
        assert capsys.readouterr().out == "✓ 02.1 The runner-up – right. Checked on 20 random inputs.\n"

    def test_a_right_value_needs_no_message(self, capsys):
        exercises.check("0.1", 12)
        assert capsys.readouterr().out == "✓ 00.1 How many choices? – right.\n"

    def test_the_zero_of_a_key_may_be_left_out(self, capsys):
        exercises.check("2.1", find_exercise("02.1").solution)
        exercises.hint("2.1")
        exercises.solution("2.1")
        exercises.my_code("2.1")
        assert progress.load_progress().keys() == {"02.1"}

    def test_a_wrong_answer_is_told_where_to_get_a_hint(self, capsys):
        exercises.check("02.1", lambda logits: logits.argmax(dim=0))
        assert 'For a hint: exercises.hint("02.1")' in capsys.readouterr().out

    def test_strict_mode_raises(self, monkeypatch):
        monkeypatch.setenv("MOE_EDU_STRICT", "1")
        with pytest.raises(exercises.WrongAnswerError, match=r"02\.1: not attempted"):
            exercises.check("02.1", None)

    def test_hints_are_graded(self, capsys):
        exercises.hint("02.1")
        assert 'Next hint: exercises.hint("02.1", 2)' in capsys.readouterr().out
        exercises.hint("02.1", 2)
        assert 'The whole solution: exercises.solution("02.1")' in capsys.readouterr().out

    @pytest.mark.parametrize("number", [0, 3])
    def test_a_hint_that_does_not_exist(self, number, capsys):
        exercises.hint("02.1", number)
        assert capsys.readouterr().out == "Exercise 02.1 has hints 1 to 2.\n"

    def test_solution_prints_source(self, capsys):
        exercises.solution("02.1")
        assert capsys.readouterr().out.startswith("def second_choice(")

    @pytest.mark.parametrize("key", ["02.99", "2.99", "2.", "..1", "", "nonsense"])
    def test_an_unknown_key_gets_similar_ones(self, key):
        with pytest.raises(ValueError, match=rf"there is no exercise {key!r}; did you mean \d\d\.\d"):
            exercises.check(key, None)


class TestProgress:
    def solve(self):
        exercises.check("02.1", find_exercise("02.1").solution)

    def test_remembers_what_is_right(self, capsys):
        assert "0 of" in exercises.progress_table()
        exercises.check("02.1", lambda logits: logits)
        self.solve()
        entry = progress.load_progress()["02.1"]
        assert entry["right"]
        assert entry["tries"] == 2
        assert "✓&nbsp;02.1" in exercises.progress_table()
        exercises.check("02.1", lambda logits: logits)
        assert progress.load_progress()["02.1"]["right"]
        capsys.readouterr()
        exercises.my_code("02.1")
        assert capsys.readouterr().out.startswith("def second_choice(")

    def test_not_attempted_leaves_no_trace(self, progress_file):
        exercises.check("02.1", None)
        assert not progress_file.exists()

    def test_travels(self, tmp_path, progress_file, capsys):
        self.solve()
        exercises.export_progress(tmp_path / "mine.json")
        progress_file.unlink()
        exercises.import_progress(tmp_path / "mine.json")
        assert progress.load_progress()["02.1"]["right"]
        assert "Exercises solved: 1" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            '{"format": 2}',
            '{"format": 1, "exercises": {"02.1": {"right": 1}}}',
            '{"format": 1, "exercises": 3}',
        ],
    )
    def test_refuses_what_is_no_export(self, tmp_path, text):
        file = tmp_path / "bad.json"
        file.write_text(text, "utf-8")
        with pytest.raises(progress.ProgressError, match="bad\\.json is not a readable progress file"):
            exercises.import_progress(file)

    def test_refuses_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            exercises.import_progress(tmp_path / "none.json")

    def test_a_class_in_one_table(self, tmp_path, progress_file):
        self.solve()
        for name in ("ana", "<b>bo"):
            exercises.export_progress(tmp_path / f"{name}.json")
        (tmp_path / "cy.json").write_text("{", "utf-8")
        (tmp_path / "deep.json").write_text("[" * 200_000, "utf-8")
        (tmp_path / "folder.json").mkdir()
        before = progress_file.read_text("utf-8")
        html = exercises.class_table(tmp_path.glob("*.json"))
        assert progress_file.read_text("utf-8") == before, "a teacher's own progress stays unchanged"
        rows = [re.findall(r"<bdi[^>]*>([^<]*)</bdi>|>(\d+)<", row) for row in html.split("<tr>")[2:]]
        assert [["".join(cell) for cell in row] for row in rows[1:]] == [
            ["&lt;b&gt;bo", *"00100000000", "1"],
            ["ana", *"00100000000", "1"],
            *([name, *["–"] * 12] for name in ("cy", "deep", "folder")),
        ]
        assert "cy.json is not a readable progress file" in html
        _, unsolved = html.split("solved by nobody: ")
        assert "02.2" in unsolved
        assert "02.1" not in unsolved
        assert "03.1" not in unsolved, "nobody has begun lesson 03"

    def test_exports_with_one_name_in_different_folders(self, tmp_path):
        self.solve()
        for learner in ("ana", "bo"):
            (tmp_path / learner).mkdir()
            exercises.export_progress(tmp_path / learner / "my_progress.json")
        html = exercises.class_table(tmp_path.glob("*/*.json"))
        assert "ana/my_progress" in html
        assert "bo/my_progress" in html

    def test_a_teacher_may_read_an_export(self, tmp_path):
        (tmp_path / "reference").touch()
        exercises.export_progress(tmp_path / "mine.json")
        modes = [(tmp_path / name).stat().st_mode for name in ("mine.json", "reference")]
        assert modes[0] == modes[1]

    @pytest.mark.parametrize("paths", [[], ["none.json"]])
    def test_a_class_without_files(self, paths, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"progress files|there is no file"):
            exercises.class_table(tmp_path / path for path in paths)

    def test_source_in_an_import_is_shown_and_never_run(self, tmp_path, capsys):
        file = tmp_path / "theirs.json"
        entry = {"right": True, "tries": 1, "source": "raise SystemExit('run')"}
        file.write_text(json.dumps({"format": 1, "exercises": {"02.1": entry}}), "utf-8")
        exercises.import_progress(file)
        exercises.progress_table()
        capsys.readouterr()
        exercises.my_code("02.1")
        assert capsys.readouterr().out == "raise SystemExit('run')\n"

    def test_a_damaged_file_does_not_stop_a_check_and_is_not_lost(self, progress_file):
        progress_file.parent.mkdir()
        progress_file.write_text("{", "utf-8")
        self.solve()
        assert progress_file.read_text("utf-8") == "{"

    def test_code_that_was_never_right(self):
        with pytest.raises(ValueError, match=r"no right answer to 02\.1"):
            exercises.my_code("02.1")


class TestCells:
    def notebook(self):
        return new_notebook(
            cells=[new_markdown_cell("## Exercises", id="exercises"), new_markdown_cell("end", id="end")]
        )

    def test_are_put_after_their_heading_and_replaced(self):
        notebook = with_exercises(self.notebook(), "02")
        ids = [cell.id for cell in notebook.cells]
        assert ids[:3] == ["exercises", "exercise-02-1-task", "exercise-02-1"]
        assert ids[-1] == "end"
        assert [cell.id for cell in with_exercises(notebook, "02").cells] == ids
        nbformat.validate(notebook)

    def test_need_their_heading(self):
        with pytest.raises(ValueError, match='a cell that begins with "## Exercises"'):
            with_exercises(new_notebook(), "02")

    def test_show_the_head_of_the_solution_with_an_empty_body(self):
        assert FUNCTION.cell_source() == (
            'def double(x):\n    """x [N] to [N]: twice the values."""\n    ...  # your code\n\n\n'
            'exercises.check("02.9", double)'
        )
        assert QUESTION.cell_source() == 'answer = ...  # your number\nexercises.check("02.8", answer)'
        assert BUG.starter_source() == 'def double(x):\n    """The published code."""\n    return 3 * x'
        assert "Found in a library 1.0." in BUG.head()

    def test_can_be_solved(self):
        notebook = solved(with_exercises(self.notebook(), "02"), "02")
        sources = [cell.source for cell in notebook.cells if cell.id == "exercise-02-1"]
        assert sources[0].startswith(find_exercise("02.1").solution_source())
        assert 'exercises.check("02.1", second_choice)' in sources[0]

    def test_other_cells_stay(self):
        cell = new_code_cell("1 + 1", id="mine")
        assert solved(new_notebook(cells=[cell]), "02").cells[0].source == "1 + 1"
        assert exercise_cells("02")
