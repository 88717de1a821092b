"""What an exercise is, and the source that its notebook shows."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Difficulty = Literal["easy", "medium", "hard"]
Importance = Literal["helpful", "important", "essential"]

UNWRITTEN = "...  # your code"


@dataclass(frozen=True)
class Mistake:
    """A typical wrong answer and the reply to it.

    Attributes:
        answer: a function as a learner would write it; for a question, the wrong value.
        message: names the misconception and points to the fix, without giving the solution.
    """

    answer: Any
    message: str


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One exercise: a function to write, a bug to find, or a question to answer.

    Attributes:
        key: lesson and number, "03.2".
        title: in a few words.
        task: what to do, in Markdown of at most 45 words.
        difficulty, importance, minutes: for the learner to plan with.
        solution: the function, with type hints and a docstring that gives the shapes; it uses only `torch`,
            `math` and `F` (torch.nn.functional). For a question, the value.
        draw: draws the inputs of one case from the generator; None for a question.
        mistakes: two or more.
        hints: two or more, from a nudge to nearly the answer.
        starter: the published code with the bug to fix, under any name; if None, the notebook shows the head of the
            solution with an empty body.
        origin: of a real bug: library, release and file.
        cases: how many random inputs to try.
        tolerance: the largest accepted error, relative and absolute.
        is_piece: whether lesson 06 builds the answer into its model; its dtypes and gradients are then checked too.
    """

    key: str
    title: str
    task: str
    difficulty: Difficulty
    importance: Importance
    minutes: int
    solution: Any
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, ...]
    draw: Callable[[torch.Generator], tuple[Any, ...]] | None = None
    starter: Callable[..., Any] | None = None
    origin: str = ""
    cases: int = 20
    tolerance: float = 1e-4
    is_piece: bool = False

    @property
    def is_question(self) -> bool:
        """Whether the answer is a value instead of a function."""
        return self.draw is None

    @property
    def answer_name(self) -> str:
        """What the learner's answer is called in the notebook."""
        return "answer" if self.is_question else self.solution.__name__

    def starter_source(self) -> str:
        """The code that the notebook's cell begins with."""
        if self.is_question:
            return "answer = ...  # your number"
        if self.starter is not None:
            return _renamed(source_of(self.starter), self.starter.__name__, self.answer_name)
        source = source_of(self.solution)
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef)
        head = source.splitlines()[: function.body[0].end_lineno]  # up to the end of the docstring
        return "\n".join([*head, f"    {UNWRITTEN}"])

    def solution_source(self) -> str:
        """The solution, ready to be pasted into the cell."""
        return f"answer = {self.solution!r}" if self.is_question else source_of(self.solution)

    def head(self) -> str:
        """The text above the cell, in Markdown."""
        minutes = f"{self.minutes} minute{'' if self.minutes == 1 else 's'}"
        found = f" Found in {self.origin}." if self.origin else ""
        return (
            f"### {self.key} {self.title}\n\n{self.task}{found}\n\n"
            f"*{self.difficulty.capitalize()}, {self.importance}, {minutes}.*"
        )

    def cell_source(self) -> str:
        """The cell: the starter and its check."""
        gap = "\n" if self.is_question else "\n\n\n"
        return f'{self.starter_source()}{gap}exercises.check("{self.key}", {self.answer_name})'


def source_of(function: Callable[..., Any]) -> str:
    """The source of a function, from its `def` on."""
    return textwrap.dedent(inspect.getsource(function)).rstrip()


def _renamed(source: str, old: str, new: str) -> str:
    return source.replace(f"def {old}(", f"def {new}(", 1)
