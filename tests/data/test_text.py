import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_edu.data import normalize_text

any_text = st.text(st.characters(codec=None))  # lone surrogates too


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3:45\u202fPM", "3:45 PM"),
        ("1\u00a0234,5  km ", "1 234,5 km"),
        ("\u200f5 \u2066km\u2069\ufeff", "5 km"),
        ("a\tb\r\nc\x00d\u2028e", "a b c d e"),
        ("e\u0301te\u0301", "été"),
        ("e\u200e\u0301", "é"),
        ("می\u200cشود", "می\u200cشود"),  # a zero-width non-joiner is spelling
        ("a▁b", "a b"),
        ("\ud800", "\ufffd"),
        ("", ""),
    ],
)
def test_known_values(text, expected):
    assert normalize_text(text) == expected


@given(any_text)
def test_normal_text_is_stable_and_plain(text):
    normal = normalize_text(text)
    assert normalize_text(normal) == normal
    assert normal == " ".join(normal.split())
    assert unicodedata.is_normalized("NFC", normal)
    assert not any(unicodedata.category(char) in ("Cc", "Cs") for char in normal)


@given(st.lists(st.text("abcxyz09.,-", min_size=1), max_size=5).map(" ".join))
def test_plain_words_stay(text):
    assert normalize_text(text) == text
