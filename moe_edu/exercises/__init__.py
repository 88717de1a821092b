"""Exercises that check themselves: `check("02.1", my_function)`, `hint("02.1")`, `solution("02.1")`.

An answer is not attempted, wrong, an error in the learner's code, or right. It is tried on fresh random inputs in a
process of its own, so neither an endless loop nor a crash ends the lesson.
"""

from moe_edu.exercises.class_table import class_table
from moe_edu.exercises.commands import WrongAnswerError, check, hint, solution
from moe_edu.exercises.progress import export_progress, import_progress, my_code, progress_table

__all__ = [
    "WrongAnswerError",
    "check",
    "class_table",
    "export_progress",
    "hint",
    "import_progress",
    "my_code",
    "progress_table",
    "solution",
]
