"""What a learner calls: check, hint, solution."""

from __future__ import annotations

import inspect
import os
import random
import textwrap
from typing import Any

from moe_edu.exercises.judge import judge
from moe_edu.exercises.progress import record
from moe_edu.exercises.registry import find_exercise
from moe_edu.exercises.sandbox import run_guarded

STRICT = "MOE_EDU_STRICT"  # environment variable: anything but a right answer raises
TIME_LIMIT = 20.0  # seconds for all cases of one check
_WIDTH = 106  # columns; JupyterLab breaks longer lines inside a word in a window of 1280 pixels
_SIGNS = {"not attempted": "○", "wrong": "✗", "error": "!", "right": "✓"}


class WrongAnswerError(Exception):
    """Raised in strict mode, where every answer has to be right."""


def check(key: str, answer: Any) -> None:
    """Check an answer and print the verdict; a right or wrong one is kept in your progress.

    Args:
        key: of the exercise, "02.1" or "2.1".
        answer: the function you wrote (not its result), or the value that the exercise asks for.

    Raises:
        ValueError: no such exercise.
        WrongAnswerError: the answer is not right, in strict mode (environment variable MOE_EDU_STRICT=1).
    """
    exercise = find_exercise(key)
    seed = random.SystemRandom().randrange(2**31)
    report = run_guarded(lambda: judge(exercise, answer, seed), TIME_LIMIT)
    if report.printed:
        print(report.printed, end="" if report.printed.endswith("\n") else "\n")
    verdict = report.verdict
    print(
        _wrapped(
            f"{_SIGNS[verdict.outcome]} {exercise.key} {exercise.title} – {verdict.outcome}. {verdict.message}"
        )
    )
    if verdict.outcome in ("wrong", "error"):
        print(f'  For a hint: exercises.hint("{exercise.key}")')
    record(exercise.key, verdict, _source(answer))
    if os.environ.get(STRICT) == "1" and verdict.outcome != "right":
        raise WrongAnswerError(f"{exercise.key}: {verdict.outcome}. {verdict.message}")


def _wrapped(text: str) -> str:
    return "\n".join(
        textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def hint(key: str, number: int = 1) -> None:
    """Print a hint, or which hints there are; a higher `number` reveals more.

    Raises:
        ValueError: no such exercise.
    """
    exercise = find_exercise(key)
    hints = exercise.hints
    if not 1 <= number <= len(hints):
        print(f"Exercise {exercise.key} has hints 1 to {len(hints)}.")
        return
    print(f"Hint {number} of {len(hints)}: {hints[number - 1]}")
    if number < len(hints):
        print(f'Next hint: exercises.hint("{exercise.key}", {number + 1})')
    else:
        print(f'The whole solution: exercises.solution("{exercise.key}")')


def solution(key: str) -> None:
    """Print a solution.

    Raises:
        ValueError: no such exercise.
    """
    print(find_exercise(key).solution_source())


def _source(answer: Any) -> str:
    """The source of a function, or the `repr` of a value."""
    try:
        return inspect.getsource(answer)
    except (TypeError, OSError):
        return repr(answer)
