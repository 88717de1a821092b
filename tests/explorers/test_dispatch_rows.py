"""The rows of the explorer travel as moe_edu's do, and arrive."""

import pytest
import torch

from moe_edu.analysis.six_words import WORDS, six_words
from moe_edu.explorers.dispatch_rows import EXPLORER, view
from moe_edu.moe.dispatch import permute, plan_dispatch, unpermute
from moe_edu.moe.routing import top2_gating

each_capacity = pytest.mark.parametrize("capacity", range(1, 7))


@each_capacity
def test_rows_are_sorted_by_expert_and_the_dropped_come_last(capacity):
    shown = view(EXPLORER.state(capacity=capacity))
    kept = [shown["kept"][n // 2][n % 2] for n in shown["order"]]
    assert kept == sorted(kept, reverse=True)
    assert sum(shown["counts"]) == sum(kept)
    assert max(shown["counts"]) <= capacity
    experts = [EXPLORER.data["expert"][n // 2][n % 2] for n in shown["order"][: sum(kept)]]
    assert experts == sorted(experts)


@each_capacity
def test_each_slot_holds_one_row(capacity):
    shown = view(EXPLORER.state(capacity=capacity))
    seats = [
        (EXPLORER.data["expert"][t][k], shown["slot"][t][k])
        for t in range(len(WORDS))
        for k in range(2)
        if shown["kept"][t][k]
    ]
    assert len(set(seats)) == len(seats)
    assert all(0 <= slot < capacity for _, slot in seats)


def test_the_mixture_in_the_sentence_is_the_layers():
    words = six_words(torch.float64)
    routing = top2_gating(words.logits, capacity=4)
    plan = plan_dispatch(routing)
    experts = torch.arange(4.0, dtype=torch.float64).repeat_interleave(plan.counts)[:, None]
    mixed = unpermute(permute(words.hidden, plan) * 0 + experts, routing.combine_weights, plan)
    sentence = view(EXPLORER.state(step=5, word="le"))["sentence"]
    assert sentence == "“le” becomes 0.69 × expert 0 + 0.31 × expert 3."
    assert mixed[WORDS.index("le"), 0].item() == pytest.approx(0.31 * 3, abs=0.01)


def test_says_who_comes_home_with_nothing():
    assert view(EXPLORER.state(step=5, capacity=1, word="le"))["sentence"].startswith("No expert took “le”")
    assert view(EXPLORER.state(step=4, capacity=1, word="le"))["sentence"].endswith(
        "Nothing returns to “le”."
    )
    assert (
        "“le” has no row left. 8 choices found no room"
        in view(EXPLORER.state(step=2, capacity=1, word="le"))["sentence"]
    )
