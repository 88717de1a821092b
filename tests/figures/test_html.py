"""Tables and chips hold the numbers and the routing that they are given, and text from data stays text."""

import itertools
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_edu.figures.html import (
    Snapshot,
    describe_routing,
    routing_html,
    snapshots_html,
    table_html,
    tokens_html,
)
from moe_edu.figures.theme import expert_style
from moe_edu.moe.routing import top2_gating

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
        assert (
            "is the first choice of 2 of 2 tokens; 1 of 3 experts is the first choice of some token"
            in sentence
        )
        assert (
            "With 1 slot per expert, 2 of 4 choices find no room; no expert takes \u2068dort\u2069."
            in sentence
        )

    def test_the_sentence_without_loss(self):
        assert "no room" not in describe_routing(list("abcdef"), self.routing())

    def test_the_sentence_where_no_token_loses_both(self):
        # Both prefer expert 0, and their second choices differ.
        routing = top2_gating(torch.tensor([[3.0, 2.0, 0.0], [3.0, 0.0, 2.0]]), capacity=1)
        assert describe_routing(["a", "b"], routing).endswith(
            "1 of 4 choices finds no room, but no token loses both."
        )

    def test_padding_is_not_counted(self):
        logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
        padded = top2_gating(logits, capacity=2, padding=torch.tensor([False, False, True]))
        assert "first choice of 2 of 2 tokens" in describe_routing(["a", "b", "<pad>"], padded)
        nothing = top2_gating(logits, capacity=2, padding=torch.tensor([True] * 3))
        assert describe_routing(["<pad>"] * 3, nothing) == "Padding chooses no expert."

    def test_the_busiest_is_the_busiest(self):
        tokens = [str(i) for i in range(6)]
        routing = self.routing()
        firsts = routing.expert_index[:, 0].tolist()
        most = max(len(list(group)) for _, group in itertools.groupby(sorted(firsts)))
        assert f"is the first choice of {most} of 6 tokens" in describe_routing(tokens, routing)

    def test_experts_that_are_busiest_alike_are_all_named(self):
        logits = torch.tensor([[3.0, 1, 0], [0, 3, 1], [1, 0, 3], [3, 0, 1], [0, 3, 1]])
        routing = top2_gating(logits, capacity=5)
        assert describe_routing(list("abcde"), routing).startswith(
            f"Experts {expert_style(0).label} and {expert_style(1).label} are each the first choice of 2 of 5 tokens"
        )
