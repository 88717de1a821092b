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
    """The exercise with this key, "02.1" or "2.1".

    Raises:
        ValueError: no such exercise; the message names similar keys.
    """
    by_key = {exercise.key: exercise for exercise in all_exercises()}
    full = full_key(key)
    if full not in by_key:
        near = get_close_matches(full, by_key, n=3, cutoff=0.5) or list(by_key)[:3]
        raise ValueError(f"there is no exercise {key!r}; did you mean {' or '.join(near)}?")
    return by_key[full]


def full_key(key: str) -> str:
    """The key with both digits of the lesson: "02.1" for "2.1"."""
    return f"0{key}" if key[1:2] == "." else key
