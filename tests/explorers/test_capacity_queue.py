"""The capacity queue's numbers are the router's, and no tie makes them depend on rounding."""

import math
from collections import Counter
from itertools import product

import pytest

from moe_edu.analysis.drop_rates import bilingual_batch, skew_logits
from moe_edu.explorers.capacity_queue import EXPLORER, view

STATES = [
    EXPLORER.state(factor=factor, skew=skew, first=first, priority=priority)
    for factor, skew, first, priority in product(
        (0.25, 0.5, 1.0, 1.5, 2.0), (0.0, 1.0, 4.0), ("eng", "fra"), (False, True)
    )
]


@pytest.mark.parametrize("state", STATES, ids=str)
def test_everybody_queues_and_the_first_in_line_are_kept(state):
    shown = view(state)
    T = len(shown["words"])
    in_line = [tuple(place) for queue in shown["queues"] for place in queue]
    assert sorted(in_line) == [(t, k) for t in range(T) for k in (0, 1)]
    assert shown["capacity"] == math.ceil(state["factor"] * 6)
    for expert, queue in enumerate(shown["queues"]):
        assert all(shown["expert_index"][t][k] == expert for t, k in queue)
        choices = [k for _, k in queue]
        assert choices == sorted(choices)  # first choices before second
        kept = [shown["kept"][t][k] for t, k in queue]
        assert kept == [place < shown["capacity"] for place in range(len(queue))]
        if not state["priority"]:
            assert queue == sorted(queue, key=lambda place: place[::-1])


@pytest.mark.parametrize("state", STATES, ids=str)
def test_names_the_dropped_words_by_language(state):
    shown = view(state)
    wanted = {"eng": [], "fra": []}
    for word, language, kept in zip(shown["words"], shown["languages"], shown["kept"], strict=True):
        if not any(kept):
            wanted[language].append(word)
    assert shown["dropped"] == wanted
    for word in [*wanted["eng"], *wanted["fra"]]:
        assert f"“{word}”" in shown["sentence"]


def test_the_last_in_the_queue_is_dropped_unless_priority_decides():
    def lost(**changes):
        return {code: len(words) for code, words in view(EXPLORER.state(**changes))["dropped"].items()}

    assert lost(first="eng")["fra"] > lost(first="eng")["eng"]
    assert lost(first="fra")["eng"] > lost(first="fra")["fra"]
    assert lost(first="eng", priority=True) == lost(first="fra", priority=True)


def test_priority_turns_away_others_but_not_more():
    shown, prioritized = view(EXPLORER.state()), view(EXPLORER.state(priority=True))
    assert sum(not kept for pair in shown["kept"] for kept in pair) == sum(
        not kept for pair in prioritized["kept"] for kept in pair
    )
    assert shown["dropped"]["eng"] == []
    assert all(prioritized["dropped"].values())
    assert shown["queues"][5] == shown["queues"][6] == []  # room that nobody wants, while words are dropped


def test_skew_empties_experts():
    asked = [
        sum(bool(queue) for queue in view(EXPLORER.state(skew=skew))["queues"]) for skew in (0.0, 2.0, 4.0)
    ]
    assert asked[0] == 8
    assert asked == sorted(asked, reverse=True)
    assert asked[2] < asked[0]


def test_words_of_the_batch_are_told_apart():
    batch = bilingual_batch()
    assert max(Counter(batch.words).values()) == 1
    assert Counter(batch.languages) == {"eng": 12, "fra": 12}
    assert {"the", "cat", "sleeps", "le", "chat", "dort"} <= set(batch.words)


def test_no_skew_on_the_slider_makes_a_tie():
    # Python and the page compute in the same doubles, but a tie of probabilities would hang on the last digit.
    for step in range(41):
        logits = skew_logits(bilingual_batch().logits, round(step * 0.1, 6))
        best = logits.topk(3, dim=1).values
        assert (best[:, :2] - best[:, 1:]).min() > 1e-9
        top = logits.softmax(dim=1).amax(dim=1).sort().values
        assert top.diff().min() > 1e-9
