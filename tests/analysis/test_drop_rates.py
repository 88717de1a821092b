"""The bilingual batch is always the same, and drop rates count what the router drops."""

import math

import torch

from moe_edu import top2_gating
from moe_edu.analysis.drop_rates import bilingual_batch, drop_rates, skew_logits
from moe_edu.figures.plots import drop_rate_figure

FACTORS, SKEWS = (0.25, 0.5, 1.0, 2.0, 4.0), (0.0, 1.0, 3.0, 30.0)


def random_logits(tokens=64, experts=4):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_each_call_gives_its_own_copy_of_the_same_batch():
    batch = bilingual_batch()
    assert torch.equal(batch.logits, bilingual_batch().logits)
    assert batch.logits.shape == (len(batch.words), 8)
    batch.logits.zero_()
    assert bilingual_batch().logits.any()


def test_skew_favours_the_first_experts_and_keeps_its_input():
    logits = random_logits()
    before = logits.clone()
    added = skew_logits(logits, 3.0) - logits
    assert torch.allclose(added, torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64).expand_as(added))
    assert torch.equal(logits, before)
    assert torch.equal(skew_logits(logits, 0.0), logits)


def test_rates_are_counted_from_the_routing():
    logits = random_logits()
    rates = drop_rates(logits, FACTORS, SKEWS)
    assert rates.shape == (len(SKEWS), len(FACTORS))
    for s, skew in enumerate(SKEWS):
        for f, factor in enumerate(FACTORS):
            routing = top2_gating(skew_logits(logits, skew), capacity=math.ceil(factor * 2 * 16))
            assert rates[s, f] == sum(not any(kept) for kept in routing.kept.tolist()) / 64


def test_more_room_never_drops_more():
    for prioritized in (False, True):
        rates = drop_rates(random_logits(), FACTORS, SKEWS, batch_prioritized=prioritized)
        assert (rates.diff(dim=1) <= 0).all()
        assert (rates[:, -1] == 0).all()  # at E/2 times the even share any two experts have room for all


def test_a_collapsed_router_keeps_what_two_experts_hold():
    # Every token wants experts 0 and 1, so both keep the same tokens: the first C of the batch.
    rates = drop_rates(torch.zeros(64, 4, dtype=torch.float64), (0.25, 0.5, 1.0), (30.0,))
    assert rates.tolist() == [[1 - 8 / 64, 1 - 16 / 64, 1 - 32 / 64]]


def test_the_surface_shows_the_rates_and_names_the_worst():
    rates = drop_rates(random_logits(), FACTORS, SKEWS)
    fig = drop_rate_figure(rates.tolist(), FACTORS, SKEWS)
    surface, one_per_cent = fig.data
    for lines in fig.data:
        assert (lines.x, lines.y) == (FACTORS, SKEWS)
        assert torch.allclose(torch.tensor(lines.z, dtype=torch.float64), rates, atol=0.00051)
    assert surface.contours.start == surface.contours.size == 0.1
    assert one_per_cent.contours.start == one_per_cent.contours.end == 0.01
    none = int((rates == 0).sum())
    assert fig.layout.meta["description"] == (
        "At most 88% of the tokens are dropped, with capacity factor 0.25 and skew 30; "
        f"none in {none} of {len(FACTORS) * len(SKEWS)} settings."
    )
