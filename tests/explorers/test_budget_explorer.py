"""The budget's numbers are the published ones, and move as the lesson says."""

from moe_edu.explorers.budget import EXPLORER, view

NLLB = {"layers": 24, "width": 2048}


def test_nllb_moe_and_its_dense_twin():
    sparse = view(EXPLORER.state(**NLLB, experts=128))
    assert f"{sum(sparse['stored']) / 1e9:.1f}" == "54.5"
    assert f"{sparse['gib']:.1f}" == "101.5"
    assert sparse["sparse_layers"] == 12
    assert "54.5 billion" in sparse["sentence"]
    dense = view(EXPLORER.state(**NLLB, step=0))
    assert f"{dense['gib']:.1f}" == "6.2"
    assert dense["stored"] == dense["active"]


def test_twice_the_experts_store_more_and_leave_the_work():
    few, many = (view(EXPLORER.state(**NLLB, experts=experts)) for experts in (64, 128))
    assert sum(many["stored"]) > 1.8 * sum(few["stored"])
    assert sum(many["work"]) < 1.001 * sum(few["work"])


def test_a_smaller_sparse_step_costs_work_as_well():
    assert sum(view(EXPLORER.state(step=2))["work"]) > sum(view(EXPLORER.state(step=4))["work"])


def test_a_step_beyond_the_depth_is_dense():
    assert view(EXPLORER.state(step=8, layers=6))["sparse_layers"] == 0
