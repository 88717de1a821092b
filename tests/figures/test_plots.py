"""Figures show the numbers they are given, and colours can be read."""

from typing import ClassVar

import pytest

from moe_edu.figures.plots import (
    describe_history,
    dots_figure,
    load_figure,
    score_figure,
    spread_apart,
    sweep_figure,
    training_figure,
)
from moe_edu.figures.theme import EXPERT_COLORS, contrast_ratio, expert_style

HISTORY = [
    {"step": 10, "loss": 7.5, "expert_load": {"encoder.1": [0.7, 0.3]}},
    {"step": 20, "loss": 5.25, "expert_load": {"encoder.1": [0.6, 0.4]}, "valid/chrf": 12.34},
]


class TestExpertStyle:
    def test_sixteen_experts_can_be_told_apart_without_colour(self):
        assert len({expert_style(expert).label.split()[0] for expert in range(16)}) == 16

    def test_colours_repeat_after_eight(self):
        assert [expert_style(expert + 8).color for expert in range(8)] == list(EXPERT_COLORS)
        assert len(set(EXPERT_COLORS)) == 8

    def test_labels_can_be_read_on_their_colour(self):
        for expert in range(8):
            assert contrast_ratio(expert_style(expert).color, expert_style(expert).ink) >= 4.5

    def test_contrast_of_known_pairs(self):
        assert contrast_ratio("#000000", "#FFFFFF") == pytest.approx(21)
        assert contrast_ratio("#FFFFFF", "#777777") == pytest.approx(4.48, abs=0.005)


class TestTrainingFigure:
    def test_shows_loss_score_and_loads(self):
        loss, score, first, second = training_figure(HISTORY, 100).data
        assert (list(loss.x), list(loss.y)) == ([10, 20], [7.5, 5.25])
        assert (list(score.x), list(score.y)) == ([20], [12.3])
        assert [list(first.y), list(second.y)] == [[70, 60], [30, 40]]
        assert first.fillcolor == expert_style(0).color

    def test_the_axis_ends_where_the_run_will(self):
        assert list(training_figure(HISTORY, 100).layout.xaxis.range) == [0, 100]

    def test_names_the_bands_that_have_room(self):
        history = [{"step": 1, "loss": 1.0, "expert_load": {"encoder.1": [0.97, 0.03]}}]
        labels = [annotation.text for annotation in training_figure(history, 1).layout.annotations]
        assert expert_style(0).label in labels
        assert expert_style(1).label not in labels

    def test_before_the_first_record(self):
        assert training_figure([], 100).layout.meta["description"] == "Nothing has been trained yet."

    def test_a_dense_model_has_no_loads(self):
        assert len(training_figure([{"step": 1, "loss": 1.0, "expert_load": {}}], 1).data) == 2

    def test_description(self):
        assert describe_history(HISTORY) == "After 20 steps: loss 5.25, chrF++ on validation sentences 12.3."


def test_figures_are_small_and_take_their_ground_from_the_page():
    for figure in (training_figure(HISTORY, 100), load_figure({"a": [1.0]}), score_figure({"a": 1.0})):
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
        assert len(figure.to_json()) < 5000


def test_fallback_ink_can_be_read_on_white():
    assert contrast_ratio(score_figure({"a": 1.0}).layout.font.color, "#FFFFFF") >= 4.5


def test_load_figure_cuts_each_bar_into_its_shares():
    figure = load_figure({"even": [0.5, 0.5], "uneven": [0.97, 0.03]})
    assert [list(bar.x) for bar in figure.data] == [[50, 97], [50, 3]]
    assert [list(bar.text) for bar in figure.data] == [
        [expert_style(0).label] * 2,
        [expert_style(1).label, ""],
    ]
    assert "uneven: the busiest expert is the first choice of 97%" in figure.layout.meta["description"]


def test_score_figure_ranks():
    figure = score_figure({"low": 20.04, "high": 90.0, "middle": 50.0})
    assert list(figure.data[0].y) == ["high", "middle", "low"]
    assert list(figure.data[0].x) == [90, 50, 20]
    assert figure.layout.meta["description"] == "From high with 90.0 down to low with 20.0."


class TestSweeps:
    RUNS: ClassVar = {"recall": {1: [0.5, 0.6], 8: [0.7, 0.8]}, "<b>test": {1: [0.3], 8: [0.3125]}}

    def test_every_run_is_a_dot_and_every_line_goes_through_the_means(self):
        fig = sweep_figure(self.RUNS, "experts", "share")
        dots, line, *_ = fig.data
        assert list(zip(dots.x, dots.y, strict=True)) == [(1, 0.5), (1, 0.6), (8, 0.7), (8, 0.8)]
        assert line.y == pytest.approx((0.55, 0.75))
        assert [note.text for note in fig.layout.annotations] == ["recall", "&lt;b&gt;test"]
        assert fig.layout.xaxis.type == "log"
        assert "recall goes from 0.55 at 1 to 0.75 at 8" in fig.layout.meta["description"]

    def test_labels_of_lines_that_meet_do_not_overlap(self):
        heights = {"a": 0.51, "b": 0.5, "c": 0.52, "d": 0.9}
        placed = spread_apart(heights, 0.1)
        assert list(placed) == list(heights)
        assert placed == pytest.approx({"a": 0.6, "b": 0.5, "c": 0.7, "d": 0.9})

    def test_lines_differ_by_more_than_colour(self):
        fig = sweep_figure(self.RUNS, "experts", "share")
        assert len({trace.marker.symbol for trace in fig.data if trace.mode == "markers"}) == 2
        assert len({trace.line.dash for trace in fig.data if trace.mode == "lines"}) == 2

    def test_rows_keep_their_order_and_show_their_means(self):
        fig = dots_figure({"b": [0.25, 0.75], "a": [1.0]}, "recall")
        assert fig.data[0].y == ("b", "b", "a")
        assert fig.data[1].text == ("0.50", "1.00")
        assert fig.layout.meta["description"] == "b: 0.50; a: 1.00."
        assert fig.layout.yaxis.type == "category"  # "8" is a name here, no place on a scale
