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
    """What became of an answer, and what to tell the learner."""

    outcome: Outcome
    message: str


class _Trial(NamedTuple):
    """One call of an answer: what went in, what came out, and whether the inputs were changed."""

    arguments: tuple[Any, ...]
    result: Any
    changed: bool


def judge(exercise: Exercise, answer: Any, seed: int) -> Verdict:
    """Judge `answer` on inputs drawn from `seed`."""
    return _judge_value(exercise, answer) if exercise.is_question else _judge_function(exercise, answer, seed)


def _judge_value(exercise: Exercise, answer: Any) -> Verdict:
    if answer is None or answer is ...:
        return Verdict("not attempted", "Replace the ... with your number and run the cell again.")
    if compare(answer, exercise.solution, exercise.tolerance).agrees:
        return Verdict("right", "Right.")
    for mistake in exercise.mistakes:
        if compare(answer, mistake.answer, exercise.tolerance).agrees:
            return Verdict("wrong", mistake.message)
    problem = compare(answer, exercise.solution, exercise.tolerance, "your answer").problem
    return Verdict("wrong", f"{_capitalised(problem)}." if problem else f"{answer!r} is not it.")


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
        except Exception as error:  # whatever the learner's code raises is the answer's error, not ours
            return Verdict("error", _where(error, answer, arguments))
    if all(trial.result is None or trial.result is ... for trial in trials):
        if _is_unwritten(answer):
            return _unattempted()
        return Verdict("wrong", "Your function gives nothing back: does it end with `return`?")
    if exercise.starter is not None and _behaves_like(exercise.starter, trials, exercise.tolerance):
        return Verdict(
            "not attempted", "This still does what the given code does. Find its mistake and mend it."
        )
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
                return Verdict("wrong", f"Right so far, but lesson 6's model could not use it: {error}")
        return Verdict("right", f"Right, on {len(trials)} random inputs.")
    for mistake in exercise.mistakes:
        if _behaves_like(mistake.answer, trials, exercise.tolerance):
            return Verdict("wrong", mistake.message)
    problem = next((comparison.problem for comparison in comparisons if comparison.problem), "")
    if problem:
        return Verdict("wrong", f"{_capitalised(problem)}.")
    share = sum(comparison.right for comparison in comparisons) / sum(
        comparison.total for comparison in comparisons
    )
    outcome = f"{sum(c.agrees for c in comparisons)} of {len(trials)} random inputs come out right."
    if all(comparison.total == 1 for comparison in comparisons):  # a number a case: nothing to say of shapes
        return Verdict("wrong", outcome)
    return Verdict("wrong", f"The shapes are right, and {share:.0%} of the values; {outcome}")


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _unattempted() -> Verdict:
    return Verdict("not attempted", "Replace the ... with your code and run the cell again.")


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Trial:
    given = _copied(arguments)
    result = function(*given)
    return _Trial(arguments, result, changed=not _same(given, arguments))


def _behaves_like(function: Callable[..., Any], trials: list[_Trial], tolerance: float) -> bool:
    """Whether `function` returns, or raises instead of, what was returned in every trial."""
    for trial in trials:
        try:
            expected = _call(function, trial.arguments).result
        except Exception:  # a mistake may crash on some inputs; then it is not the learner's, whose code ran
            return False
        if not compare(trial.result, expected, tolerance).agrees:
            return False
    return True


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments that the learner may spoil; a generator's copy draws the same numbers."""
    return tuple(
        argument.clone_state() if isinstance(argument, torch.Generator)
        else argument.detach().clone().requires_grad_(argument.requires_grad) if isinstance(argument, Tensor)
        else copy.deepcopy(argument)
        for argument in arguments
    )  # fmt: skip


def _same(given: Any, before: Any) -> bool:
    """Whether tensors, and lists, tuples and dictionaries of them, are as they were."""
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
    """Whether a function's body is a docstring and `...` at most."""
    code = getattr(answer, "__code__", None)

    def empty() -> None:
        """What an empty body compiles to."""

    return code is not None and code.co_code == empty.__code__.co_code


def _where(error: Exception, answer: Any, arguments: tuple[Any, ...]) -> str:
    """The error, the line of the learner's code that raised it, and the inputs' shapes."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = f' in the line "{frames[-1].line}"' if frames and frames[-1].line else ""
    inputs = ", ".join(map(describe, arguments))
    return f"{type(error).__name__}{line}: {str(error).rstrip('.')}. The inputs were {inputs}."
