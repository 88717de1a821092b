"""The saved values are those that transformers computes, and ours agree with both."""

import json

import pytest
import torch

from moe_edu.experiments import reference_parity
from moe_edu.experiments.reference_parity import (
    SAVED,
    live_values,
    model_digest,
    our_values,
    reference_values,
    saved_values,
)


@pytest.fixture(scope="module")
def ours():
    return our_values()


def assert_equal_values(values, ours):
    assert values.hidden.shape == ours.hidden.shape
    assert (values.hidden - ours.hidden).abs().max() <= 2e-5 * values.hidden.abs().max()
    assert values.gradient_norms.keys() == ours.gradient_norms.keys()
    largest = max(values.gradient_norms.values())
    for name, norm in values.gradient_norms.items():
        assert norm == pytest.approx(ours.gradient_norms[name], rel=2e-4, abs=2e-7 * largest), name
    assert values.ids == ours.ids


def test_saved_values_are_of_the_model_that_ships():
    """A new model needs new values: python -m moe_edu.experiments.reference_parity"""
    assert json.loads(SAVED.read_text("utf-8"))["model"] == model_digest()


def test_saved_values_are_ours(ours):
    assert_equal_values(saved_values(), ours)


def test_live_values_equal_ours_and_the_saved_ones(ours):
    pytest.importorskip("transformers")
    live = live_values()
    assert_equal_values(live, ours)
    assert_equal_values(live, saved_values())


def test_every_expert_has_its_gradient(ours):
    experts = [name for name in ours.gradient_norms if ".experts.expert_" in name]
    assert len(experts) == 8 * 4
    assert torch.tensor(list(ours.gradient_norms.values())).isfinite().all()


@pytest.mark.parametrize(("installed", "origin"), [(True, "computed now"), (False, "saved values")])
def test_the_lesson_runs_with_and_without_transformers(monkeypatch, installed, origin):
    monkeypatch.setattr(reference_parity, "reference_is_installed", lambda: installed)
    assert origin in reference_values().origin


def test_another_release_is_not_used(monkeypatch):
    monkeypatch.setattr(reference_parity, "version", lambda package: "5.23.0")
    assert not reference_parity.reference_is_installed()
