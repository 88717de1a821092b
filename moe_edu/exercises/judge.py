"""Judge an answer: not attempted, wrong, an error in the learner's code, or right."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moe_edu.exercises.capstone import PieceError, Pieces, check_pieces
from moe_edu.exercises.compare import compare, describe
from moe_edu.exercises.exercise import Exercise

Outcome = Literal["not attempted", "wrong", "error", "right"]


class Verdict(NamedTuple):
    """The outcome, and the message for the learner."""

    outcome: Outcome
    message: str


class _Trial(NamedTuple):
    """One call of an answer: its arguments, its result, and whether it changed its arguments."""

    arguments: tuple[Any, ...]
    result: Any
    changed: bool


def judge(exercise: Exercise, answer: Any, seed: int) -> Verdict:
    """Judge `answer` on inputs drawn from `seed`."""
    return _judge_value(exercise, answer) if exercise.is_question else _judge_function(exercise, answer, seed)


def _judge_value(exercise: Exercise, answer: Any) -> Verdict:
    if answer is None or answer is ...:
        return Verdict("not attempted", "Replace `...` with your number and run the cell again.")
    if compare(answer, exercise.solution, exercise.tolerance).agrees:
        return Verdict("right", "")
    for mistake in exercise.mistakes:
        if compare(answer, mistake.answer, exercise.tolerance).agrees:
            return Verdict("wrong", mistake.message)
    problem = compare(answer, exercise.solution, exercise.tolerance, "your answer").problem
    return Verdict("wrong", f"{_capitalised(problem)}." if problem else f"{answer!r} is not the answer.")


def _judge_function(exercise: Exercise, answer: Any, seed: int) -> Verdict:
    assert exercise.draw is not None
    if answer is None or answer is ...:
        return Verdict("not attempted", "Write the function and run the cell again.")
    if not callable(answer):
        return Verdict("wrong", f"Pass the function {exercise.answer_name} itself, not {describe(answer)}.")
    generator = torch.Generator().manual_seed(seed)
    trials = []
    for _ in range(exercise.cases):
        arguments = exercise.draw(generator)
        try:
            trials.append(_call(answer, arguments))
        except NotImplementedError:
            return _unattempted()
        except Exception as error:  # whatever the learner's code raises is an error in the answer, not here
            return Verdict("error", _where(error, answer, arguments))
    if all(trial.result is None or trial.result is ... for trial in trials):
        if _is_unwritten(answer):
            return _unattempted()
        return Verdict("wrong", "Your function returns None: does it end with `return`?")
    if exercise.starter is not None and _behaves_like(exercise.starter, trials, exercise.tolerance):
        return Verdict("not attempted", "This still behaves like the given code. Find its bug and fix it.")
    comparisons = [
        compare(trial.result, _call(exercise.solution, trial.arguments).result, exercise.tolerance)
        for trial in trials
    ]
    if all(comparison.agrees for comparison in comparisons):
        if any(trial.changed for trial in trials):
            return Verdict(
                "wrong", "The values are right, but your function changes its inputs. Work on a copy."
            )
        if exercise.is_piece:
            try:
                check_pieces(Pieces(**{exercise.answer_name: answer}))
            except PieceError as error:
                return Verdict(
                    "wrong", f"The values are right, but the model of lesson 6 cannot use it: {error}"
                )
        return Verdict("right", f"Checked on {len(trials)} random inputs.")
    for mistake in exercise.mistakes:
        if _behaves_like(mistake.answer, trials, exercise.tolerance):
            return Verdict("wrong", mistake.message)
    problem = next((comparison.problem for comparison in comparisons if comparison.problem), "")
    if problem:
        return Verdict("wrong", f"{_capitalised(problem)}.")
    agreeing = sum(comparison.agrees for comparison in comparisons)
    outcome = f"Your function is right on {agreeing} of {len(trials)} random inputs."
    if all(comparison.total == 1 for comparison in comparisons):  # one number per case has no shape
        return Verdict("wrong", outcome)
    right = sum(comparison.right for comparison in comparisons)
    percent = 100 * right // sum(comparison.total for comparison in comparisons)  # 100 only if all are right
    share = f"only {percent}%" if right else "none"
    return Verdict("wrong", f"The shapes are right, but {share} of the values are. {outcome}")


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _unattempted() -> Verdict:
    return Verdict("not attempted", "Replace `...` with your code and run the cell again.")


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Trial:
    given = _copied(arguments)
    result = function(*given)
    return _Trial(arguments, result, changed=not _same(given, arguments))


def _behaves_like(function: Callable[..., Any], trials: list[_Trial], tolerance: float) -> bool:
    """Whether `function` returns what the answer returned, in every trial."""
    for trial in trials:
        try:
            expected = _call(function, trial.arguments).result
        except Exception:  # the learner's code did not crash here, so it is another mistake
            return False
        if not compare(trial.result, expected, tolerance).agrees:
            return False
    return True


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies that the learner may overwrite; a generator's copy draws the same numbers."""
    return tuple(
        argument.clone_state() if isinstance(argument, torch.Generator)
        else argument.detach().clone().requires_grad_(argument.requires_grad) if isinstance(argument, Tensor)
        else copy.deepcopy(argument)
        for argument in arguments
    )  # fmt: skip


def _same(given: Any, before: Any) -> bool:
    """Whether tensors, and lists, tuples and dictionaries of them, are unchanged."""
    if type(given) is not type(before):
        return False
    if isinstance(before, Tensor):
        return given.dtype == before.dtype and torch.equal(given, before)
    if isinstance(before, Mapping):
        return given.keys() == before.keys() and all(_same(given[key], before[key]) for key in before)
    if isinstance(before, list | tuple):
        return len(given) == len(before) and all(map(_same, given, before))
    return True


def _is_unwritten(answer: Any) -> bool:
    """Whether a function's body is at most a docstring and `...`."""
    code = getattr(answer, "__code__", None)

    def empty() -> None:
        """Compiles to the code of an empty body."""

    return code is not None and code.co_code == empty.__code__.co_code


def _where(error: Exception, answer: Any, arguments: tuple[Any, ...]) -> str:
    """The error, the line of the learner's code that raised it, and the shapes of the inputs."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = f' in the line "{frames[-1].line}"' if frames and frames[-1].line else ""
    inputs = ", ".join(map(describe, arguments))
    return f"{type(error).__name__}{line}: {str(error).rstrip('.')}. Inputs: {inputs}."
