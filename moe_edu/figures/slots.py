"""GShard's dense tensors as pictures: words on the left, experts and their slots on top."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

from moe_edu.figures.theme import expert_style

# Inline, because JupyterLab drops the style sheet of a notebook that is not trusted.
_NAME = "text-align: right; padding: 0 10px"
_CELL = "width: 40px; height: 26px; text-align: center; padding: 0; font-size: 12px"


def slots_html(words: Sequence[str], tensor: Tensor) -> str:
    """A `[T, E, C]` tensor as one matrix: a row per word, a block of C columns per expert; zeros are faint dots.

    Raises:
        ValueError: the number of `words` is not the tensor's number of tokens.
    """
    T, E, C = tensor.shape
    if len(words) != T:
        raise ValueError(f"{len(words)} words cannot name the rows of a tensor {list(tensor.shape)}")
    experts = "".join(
        f'<th colspan="{C}" style="{_CELL}; {_filled(e)}; border: 1px solid">{expert_style(e).label}</th>'
        for e in range(E)
    )
    slots = "".join(
        f'<th style="{_CELL}; font-weight: 400{_edge(c)}">{c}</th>' for _ in range(E) for c in range(C)
    )
    digits = 0 if bool(((tensor == 0) | (tensor == 1)).all()) else 2
    body = "".join(
        f'<tr style="background: transparent"><th style="{_NAME}">{escape(word)}</th>'
        + "".join(_cell(value, digits, e, c) for e, row in enumerate(rows) for c, value in enumerate(row))
        + "</tr>"
        for word, rows in zip(words, tensor.tolist(), strict=True)
    )
    return (
        f'<div class="moe"><table style="border-collapse: collapse; width: auto; margin: 8px 0"><thead>'
        f'<tr style="background: transparent"><th style="{_NAME}; font-weight: 400">expert</th>{experts}</tr>'
        f'<tr style="background: transparent"><th style="{_NAME}; font-weight: 400">slot</th>'
        f"{slots}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: float, digits: int, expert: int, slot: int) -> str:
    if value == 0:
        return f'<td style="{_CELL}; opacity: 0.75{_edge(slot)}">·</td>'
    return f'<td style="{_CELL}; {_filled(expert)}; font-weight: 600{_edge(slot)}">{value:.{digits}f}</td>'


def _filled(expert: int) -> str:
    look = expert_style(expert)
    return f"background-color: {look.color}; color: {look.ink}"


def _edge(slot: int) -> str:
    """A line before an expert's first slot."""
    return "; border-left: 1px solid rgba(128,128,128,0.7)" if slot == 0 else ""
