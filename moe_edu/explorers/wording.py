"""How the sentences below the pictures write numbers and lists; `kit.js` has the same functions."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal


def fixed(value: float, digits: int = 2) -> str:
    """`value` rounded to `digits` decimals, halves away from zero, with a real minus sign."""
    rounded = Decimal(abs(value)).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP)
    return f"{'−' if value < 0 and rounded else ''}{rounded}"


def percent(share: float, digits: int = 0) -> str:
    """A share from 0 to 1 in per cent: "12 %"."""
    return f"{fixed(100 * share, digits)} %"


def listed(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([*([", ".join(items[:-1])] if len(items) > 1 else []), *items[-1:]])


def count(number: int, thing: str) -> str:
    """ "1 word", "2 words", "no words"."""
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"
