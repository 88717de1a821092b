"""Text and routings to HTML: tables, and the tokens of a phrase as chips; pure functions that return a string.

Every piece of text that comes from data is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from moe_edu.figures.theme import expert_style
from moe_edu.moe.routing import RouterOutput

_MAX_TRANSLATION_CHARS = 80
# A number, optionally with a sign, a margin or the end of a range, and a unit; or a dash, or nothing.
_QUANTITY = re.compile(
    r"([x~+−-]\s?)?\d+([.,]\d+)*(\s?(±|to)\s?\d+([.,]\d+)*)?(\s?(%|×|[A-Za-z]{1,5}))?|[-–−]?"
)


class Snapshot(NamedTuple):
    """The translations of a few phrases after `step` optimizer steps."""

    step: int
    translations: tuple[str, ...]


def table_html(header: Sequence[str], rows: Iterable[Sequence[str | int]], caption: str = "") -> str:
    """A table; columns of numbers are right-aligned, and whole numbers have thousands separators.

    Raises:
        ValueError: a row does not have one cell for each column of the header.
    """
    rows = list(rows)
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} cells under a header of {len(header)}: {row!r}")
    classes = [
        ' class="moe-num"' if all(map(_is_number, column)) else "" for column in zip(*rows, strict=True)
    ]
    classes = classes or [""] * len(header)
    head = "".join(f"<th{c}>{escape(name)}</th>" for name, c in zip(header, classes, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{c}>{_cell(value)}</td>' for value, c in zip(row, classes, strict=True))}</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    table = f"{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="moe"><table class="moe-table">{table}</table></div>'


def snapshots_html(sources: Sequence[str], references: Sequence[str], snapshots: Sequence[Snapshot]) -> str:
    """Phrases side by side, one row per snapshot: how their translations changed, with a tick at each right one."""

    def cell(translation: str, reference: str) -> str:
        if translation == reference:
            return f'<td class="moe-right">✓ {escape(translation)}</td>'
        return f"<td>{escape(_shortened(translation))}</td>"

    head = "".join(f"<th>{_isolated_html(source)}</th>" for source in sources)
    body = "".join(
        f'<tr><td class="moe-num">{snapshot.step:,}</td>'
        + "".join(map(cell, snapshot.translations, references))
        + "</tr>"
        for snapshot in snapshots
    )
    goal = "".join(f"<th>{escape(reference)}</th>" for reference in references)
    return (
        f'<div class="moe"><table class="moe-table"><thead><tr><th class="moe-num">step</th>{head}</tr></thead>'
        f'<tbody>{body}<tr><th class="moe-num">reference</th>{goal}</tr></tbody></table></div>'
    )


def tokens_html(tokens: Sequence[str]) -> str:
    """The tokens of a phrase as a row of chips."""
    return f'<div class="moe">{_chip_line(" ".join(map(_plain_chip, tokens)))}</div>'


def routing_html(tokens: Sequence[str], routing: RouterOutput, *, line: int | None = None) -> str:
    """The tokens of a phrase as chips that show where each goes.

    A chip holds the token and its first choice on that expert's colour, with its mark, number and gate; below, in a
    dashed frame, its second choice. A choice that found no room is hatched and crossed out; a token that lost both
    says "dropped".

    Args:
        tokens: the T tokens that were routed.
        routing: of those tokens.
        line: tokens per line, for a batch of sentences of equal length; None for a single sentence.

    Raises:
        ValueError: the tokens are not those of `routing`.
    """
    if len(tokens) != routing.num_tokens:
        raise ValueError(f"{len(tokens)} tokens cannot show the routing of {routing.num_tokens}")
    chips = [_chip(token, *choices) for token, choices in zip(tokens, _choices(routing), strict=True)]
    line = line or max(len(chips), 1)
    lines = (" ".join(chips[start : start + line]) for start in range(0, len(chips), line))
    return f'<div class="moe">{"".join(map(_chip_line, lines))}</div>'


def describe_routing(tokens: Sequence[str], routing: RouterOutput) -> str:
    """What `routing_html` shows, in a sentence or two."""
    made = {i: choices for i, choices in enumerate(_choices(routing)) if choices}
    if not made:
        return "Padding chooses no expert."
    firsts = [first.expert for first, *_ in made.values()]
    most = max(map(firsts.count, firsts))
    busiest = [expert_style(expert).label for expert in dict.fromkeys(firsts) if firsts.count(expert) == most]
    who = (
        f"Expert {busiest[0]} is"
        if len(busiest) == 1
        else f"Experts {', '.join(busiest[:-1])} and {busiest[-1]} are each"
    )
    used = len(set(firsts))
    sentence = (
        f"{who} the first choice of {most} of {len(made)} tokens; "
        f"{used} of {routing.num_experts} experts {'is' if used == 1 else 'are'} the first choice of some token."
    )
    kept = [choice.kept for choices in made.values() for choice in choices]
    if all(kept):
        return sentence
    left_behind = [tokens[i] for i, choices in made.items() if not any(choice.kept for choice in choices)]
    ending = (
        f"; no expert takes {', '.join(map(_isolated_text, left_behind))}."
        if left_behind
        else ", but no token loses both."
    )
    slots = f"{routing.capacity} slot{'s' if routing.capacity != 1 else ''}"
    lost = kept.count(False)
    finds = "finds" if lost == 1 else "find"
    return f"{sentence} With {slots} per expert, {lost} of {len(kept)} choices {finds} no room{ending}"


class _Choice(NamedTuple):
    expert: int
    gate: float
    kept: bool


def _choices(routing: RouterOutput) -> list[tuple[_Choice, ...]]:
    """The choices of each token, first choice first."""
    columns = (routing.expert_index, routing.combine_weights, routing.kept)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [tuple(_Choice(*choice) for choice in zip(*row, strict=True) if choice[0] >= 0) for row in rows]


_CHIP_STYLE = "display: inline-block; margin: 2px; text-align: center; vertical-align: top"


def _chip_line(chips: str) -> str:
    return f'<div class="moe-chips" role="list">{chips}</div>'


def _plain_chip(token: str, border: str = "solid") -> str:
    style = f"{_CHIP_STYLE}; padding: 1px 6px; border: 1px {border}"
    return f'<span class="moe-chip moe-plain" role="listitem" style="{style}">{_token(token)}</span>'


def _chip(token: str, first: _Choice | None = None, second: _Choice | None = None) -> str:
    if first is None:  # padding chooses no expert
        return _plain_chip(token, "dotted")
    lines = [_token(token), _gate(first)]
    if not first.kept and (second is None or not second.kept):
        lines.insert(1, "dropped")
    parts = _half(first, "moe-first", "solid", "<br>".join(lines))
    if second is not None:
        parts += _half(second, "moe-second", "dashed", _gate(second))
    return f'<span class="moe-chip" role="listitem" style="{_CHIP_STYLE}">{parts}</span>'


def _half(choice: _Choice, name: str, border: str, content: str) -> str:
    """The half of a chip that shows one choice, on its expert's colour."""
    look = expert_style(choice.expert)
    style = f"display: block; padding: 1px 6px; border: 1px {border}; background-color: {look.color}; color: {look.ink}"
    classes = f"moe-choice {name}{'' if choice.kept else ' moe-no-room'}"
    return f'<span class="{classes}" style="{style}">{content}</span>'


def _token(token: str) -> str:
    return f'<span class="moe-token">{_isolated_html(token)}</span>'


def _gate(choice: _Choice) -> str:
    label = expert_style(choice.expert).label
    return f"<b>{label}</b> {choice.gate:.2f}" if choice.kept else f"✕ <b>{label}</b>"


def _isolated_text(token: str) -> str:
    """As `_isolated_html`, in plain text: between FIRST STRONG ISOLATE and POP DIRECTIONAL ISOLATE."""
    return f"\u2068{token}\u2069"


def _isolated_html(text: str) -> str:
    """Escaped text of any script, in its own direction, without changing the direction of its surroundings."""
    return f'<bdi dir="auto">{escape(text)}</bdi>'


def _shortened(text: str) -> str:
    """The text, cut if it is long: a model that stutters fills whole pages."""
    return text if len(text) <= _MAX_TRANSLATION_CHARS else text[: _MAX_TRANSLATION_CHARS - 1] + "…"


def _cell(value: str | int) -> str:
    return _isolated_html(value) if isinstance(value, str) else f"{value:,}"


def _is_number(value: str | int) -> bool:
    """Whether a cell holds one quantity: 7, "0.71 ± 0.02", "−3 %", "12 to 14 ms"; or a dash, or nothing."""
    return isinstance(value, int) or _QUANTITY.fullmatch(value) is not None
