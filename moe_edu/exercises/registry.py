"""All exercises by key, lesson by lesson."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from moe_edu.exercises.exercise import Exercise

LESSONS = tuple(f"{number:02}" for number in range(11))


@cache
def exercises_of(lesson: str) -> tuple[Exercise, ...]:
    """The exercises of a lesson, "00" to "10", in order: EXERCISES of its module."""
    module = f"moe_edu.exercises.lesson_{lesson}"
    if find_spec(module) is None:
        return ()
    exercises: tuple[Exercise, ...] = import_module(module).EXERCISES
    return exercises


def all_exercises() -> tuple[Exercise, ...]:
    return tuple(exercise for lesson in LESSONS for exercise in exercises_of(lesson))


def find_exercise(key: str) -> Exercise:
    """The exercise with this key.

    Raises:
        ValueError: there is none; with near matches.
    """
    by_key = {exercise.key: exercise for exercise in exercises_of(key[:2])}
    if key not in by_key:
        keys = [exercise.key for exercise in all_exercises()]
        near = get_close_matches(key, keys, n=3, cutoff=0.5) or keys[:3]
        raise ValueError(f"there is no exercise {key!r}; did you mean {' or '.join(near)}?")
    return by_key[key]
