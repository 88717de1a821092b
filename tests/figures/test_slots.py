"""The dense tensors' picture shows each value in its place, and only text as text."""

import re

import pytest
import torch

from moe_edu.analysis.six_words import WORDS, six_words
from moe_edu.figures.slots import slots_html
from moe_edu.moe.routing import top2_gating


def cells(html):
    return [
        re.findall(r"<td[^>]*>([^<]*)</td>", row)
        for row in re.findall(r"<tr.*?</tr>", html, flags=re.DOTALL)
        if "<td" in row
    ]


def test_shows_every_number_where_it_is():
    mask = top2_gating(six_words().logits, capacity=3).dispatch_mask()
    shown = cells(slots_html(WORDS, mask * 1.0))
    assert [[text == "1" for text in row] for row in shown] == mask.flatten(1).tolist()


def test_rounds_gates_and_tells_zero_from_small():
    tensor = torch.tensor([[[0.0, 0.001]], [[0.625, 1.0]]])
    assert cells(slots_html(["a", "b"], tensor)) == [["·", "0.00"], ["0.62", "1.00"]]


def test_words_are_escaped():
    assert "<b>" not in slots_html(["<b>"], torch.zeros(1, 2, 2))


def test_words_must_fit():
    with pytest.raises(ValueError, match=r"2 words cannot name the rows of a tensor \[3, 1, 1\]"):
        slots_html(["a", "b"], torch.zeros(3, 1, 1))
