"""Exercises of lesson 10: bugs in published code, to find and fix.

Each starter is a few lines of our own with the logic of the published code and its bug; `origin` names the release
and the file. tests/exercises/test_lesson_10.py compares them with the published code where it can be installed.
"""

from __future__ import annotations

from moe_edu.exercises import lesson_10_layer, lesson_10_losses, lesson_10_router

EXERCISES = lesson_10_router.EXERCISES + lesson_10_layer.EXERCISES + lesson_10_losses.EXERCISES
