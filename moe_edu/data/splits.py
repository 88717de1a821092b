"""Divide a table of translations into train, valid and test so that no sentence is in two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

SPLITS = ("train", "valid", "test")


def group_rows(rows: Sequence[Sequence[str | None]]) -> list[list[int]]:
    """Group the rows that share a string, in any language, directly or through other rows.

    Two meanings can have the same words in one language, such as a pound of weight and one of money. If split
    separately, one could be in the test and the other in training. Returns lists of row numbers.
    """
    parent = list(range(len(rows)))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    first_row_with: dict[str, int] = {}
    for row, texts in enumerate(rows):
        for text in texts:
            if text is not None:
                parent[find(row)] = find(first_row_with.setdefault(text, row))
    groups: dict[int, list[int]] = {}
    for row in range(len(rows)):
        groups.setdefault(find(row), []).append(row)
    return list(groups.values())


def assign_splits(
    rows: Sequence[Sequence[str | None]], held_out: Mapping[str, float], rng: Random
) -> list[str] | None:
    """Give every row its split; rows that share a string in any language get the same one.

    `held_out` maps `valid` and `test` to their shares of the rows; the rest is `train`. Each held-out split gets at
    least one group, and no more than its share unless its only group is larger. Returns None if groups are too few.
    """
    # `Random.random()` is the only method whose sequence Python promises to keep between versions.
    groups = [group for _, group in sorted((rng.random(), group) for group in group_rows(rows))]
    if len(groups) <= len(held_out):
        return None
    splits = ["train"] * len(rows)
    unfilled = len(held_out)  # the splits that still need a group after this one; train is the last
    for name, share in held_out.items():
        room = max(share * len(rows), min(map(len, groups)))
        kept: list[list[int]] = []
        for i, group in enumerate(groups):
            left = len(kept) + len(groups) - i - 1
            if len(group) > room or left < unfilled:
                kept.append(group)
                continue
            room -= len(group)
            for row in group:
                splits[row] = name
        groups = kept
        unfilled -= 1
    return splits
