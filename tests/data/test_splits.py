from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from moe_edu.data.splits import assign_splits, group_rows

HELD_OUT = {"valid": 0.1, "test": 0.2}
tables = st.lists(
    st.lists(st.none() | st.integers(0, 40).map(str), min_size=2, max_size=2), min_size=0, max_size=25
)


def slow_groups(rows):
    """Merge any two groups that share a string until none do."""
    groups = [{i} for i in range(len(rows))]
    texts = [set(row) - {None} for row in rows]
    merged = True
    while merged:
        merged = False
        for a in groups:
            for b in groups:
                if a is not b and set.union(*(texts[i] for i in a)) & set.union(*(texts[i] for i in b)):
                    a |= b
                    groups.remove(b)
                    merged = True
                    break
            if merged:
                break
    return sorted(map(sorted, groups))


@given(tables)
def test_groups_are_the_connected_rows(rows):
    assert sorted(group_rows(rows)) == slow_groups(rows)


@given(tables, st.integers(0, 5))
def test_no_string_is_in_two_splits_and_no_split_is_empty(rows, seed):
    splits = assign_splits(rows, HELD_OUT, Random(seed))
    if splits is None:
        assert len(slow_groups(rows)) < 3
        return
    assert set(splits) == {"train", "valid", "test"}
    homes = {}
    for row, split in zip(rows, splits, strict=True):
        for text in filter(None, row):
            assert homes.setdefault(text, split) == split


def test_shares_and_seeds():
    rows = [(str(i), None) for i in range(1000)]
    splits = assign_splits(rows, HELD_OUT, Random(1))
    assert Counter(splits) == {"train": 700, "valid": 100, "test": 200}
    assert splits == assign_splits(rows, HELD_OUT, Random(1))
    assert splits != assign_splits(rows, HELD_OUT, Random(2))


def test_a_giant_group_trains():
    rows = [("OK", str(i)) for i in range(98)] + [("a", "b"), ("c", "d")]
    assert Counter(assign_splits(rows, HELD_OUT, Random(0))) == {"train": 98, "valid": 1, "test": 1}
