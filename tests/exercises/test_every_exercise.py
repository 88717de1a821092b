"""Every exercise: its starter counts as not attempted, its mistakes get their message, its solution is right."""

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from moe_edu.exercises.capstone import OURS
from moe_edu.exercises.compare import compare
from moe_edu.exercises.judge import judge
from moe_edu.exercises.registry import all_exercises

each_exercise = pytest.mark.parametrize("exercise", all_exercises(), ids=lambda exercise: exercise.key)
SEEDS = range(5)


def made(source, name):
    """What `source` defines as `name`, in a namespace like a notebook's."""
    namespace = {"torch": torch, "Tensor": torch.Tensor, "math": math, "F": F}
    exec(compile(source, f"<{name}>", "exec"), namespace)
    return namespace[name]


def test_keys_are_unique():
    keys = [exercise.key for exercise in all_exercises()]
    assert len(keys) == len(set(keys))


@each_exercise
class TestEveryExercise:
    def test_starter_is_not_attempted(self, exercise):
        starter = made(exercise.starter_source(), exercise.answer_name)
        assert judge(exercise, starter, 0).outcome == "not attempted"

    def test_shown_solution_is_right(self, exercise):
        answer = made(exercise.solution_source(), exercise.answer_name)
        for seed in SEEDS:
            assert judge(exercise, answer, seed) == judge(exercise, exercise.solution, seed)
            assert judge(exercise, answer, seed).outcome == "right"

    def test_typical_mistakes_are_refused_with_their_message(self, exercise):
        assert len(exercise.mistakes) >= 2
        for mistake in exercise.mistakes:
            for seed in SEEDS:
                assert judge(exercise, mistake.answer, seed) == ("wrong", mistake.message)

    def test_mistakes_have_different_messages(self, exercise):
        messages = [mistake.message for mistake in exercise.mistakes]
        assert len(set(messages)) == len(messages)

    def test_inputs_depend_on_the_seed_alone(self, exercise):
        if exercise.is_question:
            pytest.skip("a question has no inputs")
        first, again, other = (
            [
                a
                for a in exercise.draw(torch.Generator().manual_seed(seed))
                if not isinstance(a, torch.Generator)
            ]
            for seed in (1, 1, 2)
        )
        assert compare(first, again, 0.0).agrees
        assert not compare(first, other, 0.0).agrees

    def test_is_rated_and_short(self, exercise):
        assert exercise.difficulty in ("easy", "medium", "hard")
        assert exercise.importance in ("helpful", "important", "essential")
        assert 1 <= exercise.minutes <= 30
        assert len(exercise.hints) >= 2
        assert len(exercise.head().split()) <= 60
        assert len(exercise.cell_source().splitlines()) <= 25

    def test_solution_has_a_docstring(self, exercise):
        if not exercise.is_question:
            assert exercise.solution.__doc__


def test_each_lesson_has_its_number_in_the_key():
    lessons = Counter(exercise.key[:2] for exercise in all_exercises())
    assert set(lessons) <= {f"{number:02}" for number in range(11)}


def test_there_are_enough_of_them():
    lessons = Counter(exercise.key[:2] for exercise in all_exercises())
    assert len(lessons) == 11
    assert min(lessons.values()) >= 3
    assert sum(lessons.values()) >= 45
    assert sum(bool(exercise.origin) for exercise in all_exercises()) >= 10


class TestPieces:
    """Lesson 06 builds some answers into its model; it must not be the first to refuse one."""

    pieces = {exercise.answer_name: exercise for exercise in all_exercises() if exercise.is_piece}  # noqa: RUF012

    def test_are_all_the_pieces_of_the_model(self):
        assert self.pieces.keys() == OURS.keys()

    @pytest.mark.parametrize("name", ["balancing_loss", "router_z"])
    @pytest.mark.parametrize("cut", [lambda loss: loss.detach(), lambda loss: torch.tensor(loss.item())])
    def test_a_loss_without_gradient_is_refused(self, name, cut):
        exercise = self.pieces[name]
        verdict = judge(exercise, lambda *inputs: cut(exercise.solution(*inputs)), 0)
        assert verdict.outcome == "wrong"
        assert "lesson 6" in verdict.message
        assert "gradient" in verdict.message
