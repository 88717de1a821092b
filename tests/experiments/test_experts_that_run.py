"""The command that watches the published layer: here on the release that is installed, 4.57.6."""

import pytest
import torch

from moe_edu.experiments import experts_that_run
from moe_edu.experiments.experts_that_run import (
    experts_of_a_layer,
    our_loss,
    published_loss,
    router_pairs,
)

EVEN, FIRST, SECOND, OPPOSITE = router_pairs().values()


def test_every_chosen_expert_of_this_release_runs():
    chosen, ran = experts_of_a_layer()
    assert len(chosen) > 2
    assert ran == chosen


def test_experts_that_do_not_run_are_missed(monkeypatch):
    """The layer of release 5 passes a one-hot mask as indices: 0 and 1 are all that it can name."""
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    def forward(self, hidden, padding_mask):
        self.router(hidden, padding_mask)
        for expert in ("expert_0", "expert_1"):
            self.experts[expert](hidden[0])
        return hidden

    monkeypatch.setattr(NllbMoeSparseMLP, "forward", forward)
    chosen, ran = experts_of_a_layer()
    assert len(chosen) > 2
    assert ran == [0, 1]


def test_this_release_sees_the_first_layer_alone():
    even = published_loss(EVEN)
    assert published_loss(SECOND) == pytest.approx(even)
    assert published_loss(FIRST) > 2 * even


def test_ours_sees_each_layer():
    assert our_loss(EVEN) == pytest.approx(1)
    assert our_loss(FIRST) == pytest.approx(our_loss(SECOND))
    assert our_loss(OPPOSITE) - 1 == pytest.approx(2 * (our_loss(FIRST) - 1))


def test_opposite_layers_add_up_to_an_even_load():
    """What makes them the case to try: a loss over both layers at once finds nothing."""
    low, high = OPPOSITE
    used = torch.cat([low, high]).topk(2, dim=1).indices.flatten().bincount(minlength=4)
    assert used.tolist() == [8, 8, 8, 8]


class TestCommand:
    def test_prints_the_release_its_experts_and_four_losses(self, capsys):
        experts_that_run.main()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("transformers 4.57.6, one sparse layer")
        assert lines[1].split(":")[1].split() == lines[2].split(":")[1].split() == list("01234567")
        assert len(lines) == 4 + 4

    def test_says_what_is_missing(self, monkeypatch):
        def version(name):
            raise experts_that_run.PackageNotFoundError(name)

        monkeypatch.setattr(experts_that_run, "version", version)
        with pytest.raises(SystemExit, match="pip install transformers"):
            experts_that_run.main()
