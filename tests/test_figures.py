"""Figures show the numbers they are given, text from data stays text, and colours can be read."""

import itertools
from html.parser import HTMLParser
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_edu.figures import (
    Snapshot,
    describe_history,
    describe_routing,
    dots_figure,
    load_figure,
    routing_html,
    score_figure,
    snapshots_html,
    spread_apart,
    sweep_figure,
    table_html,
    tokens_html,
    training_figure,
)
from moe_edu.routing import top2_gating
from moe_edu.theme import EXPERT_COLORS, contrast_ratio, expert_style

HISTORY = [
    {"step": 10, "loss": 7.5, "expert_load": {"encoder.1": [0.7, 0.3]}},
    {"step": 20, "loss": 5.25, "expert_load": {"encoder.1": [0.6, 0.4]}, "valid/chrf": 12.34},
]
ANY_TEXT = st.text(max_size=12)


class Page(HTMLParser):
    """The text of a page, and the names of its elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.feed(html)
        self.close()

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)


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


class TestHtml:
    @given(ANY_TEXT, ANY_TEXT)
    def test_tables_show_text_as_text(self, header, cell):
        page = Page(table_html([header, "n"], [(cell, 12345)], caption=cell))
        assert set(page.tags) == {"div", "table", "caption", "thead", "tr", "th", "tbody", "td", "bdi"} - (
            set() if cell else {"caption"}
        )
        assert header in page.text
        assert cell in page.text
        assert "12,345" in page.text

    @pytest.mark.parametrize(
        "column", [[7, 12345], ["0.71 ± 0.02", "−3"], ["49.9%", "-"], ["2 ms", ""], ["1.14 to 1.61", "67 MB"]]
    )
    def test_columns_of_numbers_are_set_to_the_right_with_their_header(self, column):
        html = table_html(["name", "size"], [("a", value) for value in column])
        assert '<th>name</th><th class="moe-num">size</th>' in html
        assert html.count('<td class="moe-num">') == len(column)

    @pytest.mark.parametrize(
        "other", ["1 (dense)", "2, no balancing loss", "● 0", "1 then 8", "2 4 4", "None"]
    )
    def test_columns_with_words_are_not(self, other):
        assert "moe-num" not in table_html(["size"], [(7,), (other,)])

    def test_tables_need_a_header_for_every_column(self):
        with pytest.raises(ValueError, match="row 1 has 2 cells under a header of 1"):
            table_html(["name"], [("a", 7)])

    @given(st.lists(ANY_TEXT, min_size=1, max_size=4))
    def test_tokens_show_text_as_text(self, tokens):
        page = Page(tokens_html(tokens))
        assert set(page.tags) == {"div", "span", "bdi"}
        assert all(token in page.text for token in tokens)

    @given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
    def test_snapshots_show_text_as_text(self, source, reference, translation):
        page = Page(snapshots_html([source], [reference], [Snapshot(1000, (translation,))]))
        assert set(page.tags) <= {"div", "table", "thead", "tr", "th", "tbody", "td", "bdi"}
        assert all(text in page.text for text in (source, reference, translation, "1,000"))

    def test_snapshots_shorten_a_stutter(self):
        html = snapshots_html(["a"], ["b"], [Snapshot(1, ("w" * 500,))])
        assert "w" * 79 + "…" in html
        assert "w" * 80 not in html

    def test_snapshots_tick_what_is_right(self):
        html = snapshots_html(["a"], ["b"], [Snapshot(1, ("c",)), Snapshot(2, ("b",))])
        assert "✓ b" in html
        assert "✓ c" not in html


class TestRouting:
    def routing(self, num_tokens=6, num_experts=4, capacity=6, **options):
        logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
        return top2_gating(logits, capacity=capacity, **options)

    @given(
        num_tokens=st.integers(1, 12),
        num_experts=st.integers(2, 20),
        capacity=st.integers(0, 4),
        padded=st.integers(0, 3),
        seed=st.integers(0, 1000),
    )
    def test_every_choice_is_shown(self, num_tokens, num_experts, capacity, padded, seed):
        logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
        padding = torch.arange(num_tokens) >= num_tokens - padded
        routing = top2_gating(logits, capacity=capacity, padding=padding)
        html = routing_html(["w"] * num_tokens, routing)
        assert html.count('role="listitem"') == num_tokens
        assert html.count("✕") == int((~routing.kept & (routing.expert_index >= 0)).sum())
        assert html.count("dropped") == int((~routing.kept.any(dim=1) & ~padding).sum())
        for expert, gate in zip(
            routing.expert_index[routing.kept].tolist(),
            routing.combine_weights[routing.kept].tolist(),
            strict=True,
        ):
            assert f"<b>{expert_style(expert).label}</b> {gate:.2f}" in html

    @given(st.lists(ANY_TEXT, min_size=1, max_size=5))
    def test_tokens_are_text(self, tokens):
        page = Page(routing_html(tokens, self.routing(len(tokens))))
        assert set(page.tags) == {"div", "span", "b", "br", "bdi"}
        assert all(token in page.text for token in tokens)

    def test_tokens_of_another_phrase(self):
        with pytest.raises(ValueError, match="2 tokens cannot show the routing of 6"):
            routing_html(["a", "b"], self.routing())

    def test_a_batch_has_a_line_for_each_sentence(self):
        page = Page(routing_html(list("abcdef"), self.routing(6), line=3))
        assert page.tags.count("div") == 1 + 2
        html = routing_html(list("abcdef"), self.routing(6), line=3)
        first, second = html.split('role="list"')[1:]
        assert all(f">{token}</bdi>" in first for token in "abc")
        assert all(f">{token}</bdi>" in second for token in "def")

    def test_a_single_expert_is_no_second_choice(self):
        html = routing_html(["a"], self.routing(1, num_experts=1))
        assert "moe-first" in html
        assert "moe-second" not in html

    def test_the_sentence_counts_what_found_no_room(self):
        # Both tokens want expert 0, then expert 1; each has one place.
        routing = top2_gating(torch.tensor([[2.0, 1.0, 0.0]] * 2), capacity=1)
        sentence = describe_routing(["chat", "dort"], routing)
        assert "is the first choice of 2 of 2 tokens; 1 of 3 experts are someone's first choice" in sentence
        assert (
            "With 1 place in each expert 2 of 4 choices find no room; no expert takes \u2068dort\u2069."
            in sentence
        )

    def test_the_sentence_without_loss(self):
        assert "no room" not in describe_routing(list("abcdef"), self.routing())

    def test_the_sentence_where_no_token_loses_both(self):
        # Both prefer expert 0, and their second choices differ.
        routing = top2_gating(torch.tensor([[3.0, 2.0, 0.0], [3.0, 0.0, 2.0]]), capacity=1)
        assert describe_routing(["a", "b"], routing).endswith(
            "1 of 4 choices find no room, but no token loses both."
        )

    def test_padding_is_not_counted(self):
        logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
        padded = top2_gating(logits, capacity=2, padding=torch.tensor([False, False, True]))
        assert "first choice of 2 of 2 tokens" in describe_routing(["a", "b", "<pad>"], padded)
        nothing = top2_gating(logits, capacity=2, padding=torch.tensor([True] * 3))
        assert describe_routing(["<pad>"] * 3, nothing) == "Padding chooses nobody."

    def test_the_busiest_is_the_busiest(self):
        tokens = [str(i) for i in range(6)]
        routing = self.routing()
        firsts = routing.expert_index[:, 0].tolist()
        most = max(len(list(group)) for _, group in itertools.groupby(sorted(firsts)))
        assert f"is the first choice of {most} of 6 tokens" in describe_routing(tokens, routing)


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
