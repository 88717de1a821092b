"""Benchmark results as one self-contained SVG picture: any browser opens it, and a README can show it.

Each series has its own colour, mark and dash, so that none depends on colour alone. Whiskers reach from the fastest to
the slowest call. All axes are logarithmic: equal ratios are equally far apart. Where marks overlap, the series that was
named first is on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """One measurement: a median and, if it was repeated, the smallest and the largest value. All are positive."""

    value: float
    low: float | None = None
    high: float | None = None


class Row(NamedTuple):
    """The measurements for one size, task or explorer, by series."""

    label: str
    samples: Mapping[str, Sample]


class Panel(NamedTuple):
    """Curves over a shared axis: each series' measurements at each x."""

    title: str
    x_title: str
    y_title: str
    lines: Mapping[str, Mapping[int, Sample]]


# Colours of Okabe and Ito (https://jfly.uni-koeln.de/color/) and of Tol, all readable on white.
_COLORS = ("#0072B2", "#D55E00", "#000000", "#007A59", "#AA3377", "#6B6B6B", "#7A6200", "#56469C")
_DASHES = ("", "7 3", "2 3", "10 3 2 3", "4 4", "1 4", "12 4", "6 2 1 2")
_SHAPES = (
    "M-4,0 a4,4 0 1,0 8,0 a4,4 0 1,0 -8,0 z",  # circle
    "M-4,-4 h8 v8 h-8 z",  # square
    "M0,-5 L5,4 H-5 z",  # triangle
    "M0,-5 L5,0 L0,5 L-5,0 z",  # diamond
    "M0,5 L5,-4 H-5 z",  # triangle pointing down
    "M-4,-4 L4,4 M-4,4 L4,-4",  # cross
    "M-5,0 H5 M0,-5 V5",  # plus
    "M-5,-2 h10 v4 h-10 z",  # bar
)
_INK, _FRAME, _GRID = "#1a1a1a", "#8a8a8a", "#e2e2e2"
_WIDTH, _MARGIN = 760, 24
_ROW_HEIGHT, _PANEL_HEIGHT = 22, 250
_TITLE_HEIGHT, _LEGEND_HEIGHT = 58, 22
_CHARACTER = 6.6  # the largest width in 12 pixel text

Scale = Callable[[float], float]


def dots_svg(title: str, note: str, x_title: str, rows: Sequence[Row]) -> str:
    """One line of marks per row over a shared axis; `note` names the machine."""
    names = list(dict.fromkeys(name for row in rows for name in row.samples))
    legend, top = _legend(names)
    bottom = top + _ROW_HEIGHT * len(rows)
    left = _MARGIN + _CHARACTER * max(len(row.label) for row in rows)
    samples = [sample for row in rows for sample in row.samples.values()]
    scale, ticks = _log_axis(samples, left + 8, _WIDTH - _MARGIN)
    parts = [_vertical_axis_lines(scale, ticks, top, bottom, x_title)]
    for i, row in enumerate(rows):
        y = top + _ROW_HEIGHT * (i + 0.5)
        parts.append(_text(left, y + 4, row.label, "end"))
        for name, (value, low, high) in reversed(list(row.samples.items())):
            style = names.index(name)
            if low is not None and high is not None:
                parts.append(_line(scale(low), y, scale(high), y, _COLORS[style % len(_COLORS)], 1.5))
            parts.append(_mark(scale(value), y, style, f"{row.label}, {name}: {_number(value)}"))
    return _document(title, note, bottom + 48, legend + "".join(parts))


def curves_svg(title: str, note: str, panels: Sequence[Panel]) -> str:
    """Panels of curves, two side by side; `note` names the machine."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    legend, top = _legend(names)
    parts = [
        _panel(panel, names, left=_WIDTH / 2 * (i % 2), top=top + _PANEL_HEIGHT * (i // 2))
        for i, panel in enumerate(panels)
    ]
    height = top + _PANEL_HEIGHT * math.ceil(len(panels) / 2)
    return _document(title, note, height, legend + "".join(parts))


def write_plot(path: Path, svg: str) -> None:
    path.write_text(svg, encoding="utf-8")


def _panel(panel: Panel, names: Sequence[str], left: float, top: float) -> str:
    x0, x1 = left + 66, left + _WIDTH / 2 - 14
    y0, y1 = top + _PANEL_HEIGHT - 52, top + 26
    xs = sorted({x for points in panel.lines.values() for x in points})
    x_scale, _ = _log_axis([Sample(x) for x in xs], x0 + 8, x1 - 8)
    y_scale, ticks = _log_axis([s for points in panel.lines.values() for s in points.values()], y0, y1)
    parts = [_text(x0, top + 16, panel.title, weight="600")]
    for tick in ticks:
        parts.append(_line(x0, y_scale(tick), x1, y_scale(tick), _GRID))
        parts.append(_text(x0 - 6, y_scale(tick) + 4, _number(tick), "end"))
    for x in xs:
        parts.append(_line(x_scale(x), y0, x_scale(x), y0 + 4, _FRAME))
        parts.append(_text(x_scale(x), y0 + 18, _number(x), "middle"))
    parts.append(_line(x0, y0, x1, y0, _FRAME))
    parts.append(_text((x0 + x1) / 2, y0 + 36, panel.x_title, "middle"))
    y_title = _text(0, 0, panel.y_title, "middle")
    parts.append(f'<g transform="translate({left + 16:.1f} {(y0 + y1) / 2:.1f}) rotate(-90)">{y_title}</g>')
    for name, points in reversed(list(panel.lines.items())):
        style = names.index(name)
        color = _COLORS[style % len(_COLORS)]
        path = " ".join(f"{x_scale(x):.1f},{y_scale(points[x].value):.1f}" for x in sorted(points))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2" '
            f'stroke-dasharray="{_DASHES[style % len(_DASHES)]}"/>'
        )
        for x, (value, low, high) in points.items():
            if low is not None and high is not None:
                parts.append(_line(x_scale(x), y_scale(low), x_scale(x), y_scale(high), color, 1.5))
            label = f"{name}, {panel.x_title} {_number(x)}: {_number(value)}"
            parts.append(_mark(x_scale(x), y_scale(value), style, label))
    return "".join(parts)


def _vertical_axis_lines(scale: Scale, ticks: Sequence[float], top: float, bottom: float, title: str) -> str:
    parts = []
    for tick in ticks:
        parts.append(_line(scale(tick), top, scale(tick), bottom, _GRID))
        parts.append(_text(scale(tick), bottom + 16, _number(tick), "middle"))
    parts.append(_text(_WIDTH / 2, bottom + 36, title, "middle"))
    return "".join(parts)


def _legend(names: Sequence[str]) -> tuple[str, float]:
    """The marks with their names, and the height at which the picture below them can begin."""
    parts, x, y = [], float(_MARGIN), float(_TITLE_HEIGHT + 14)
    for style, name in enumerate(names):
        width = 46 + _CHARACTER * len(name)
        if x > _MARGIN and x + width > _WIDTH:
            x, y = float(_MARGIN), y + _LEGEND_HEIGHT
        color = _COLORS[style % len(_COLORS)]
        parts.append(_line(x, y, x + 22, y, color, 2, _DASHES[style % len(_DASHES)]))
        parts.append(_mark(x + 11, y, style, name))
        parts.append(_text(x + 28, y + 4, name))
        x += width
    return "".join(parts), y + _LEGEND_HEIGHT


def _log_axis(samples: Sequence[Sample], start: float, end: float) -> tuple[Scale, list[float]]:
    """The scale from value to pixel, and round tick values: the wider the range, the fewer."""
    values = [v for sample in samples for v in sample if v is not None]
    low, high = min(values) / 1.15, max(values) * 1.15
    length = math.log(high / low)
    steps = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 6 else (1, 2, 5) if high / low < 500 else (1,)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks = [m * 10.0**power for power in powers for m in steps]
    return (
        lambda value: start + (end - start) * math.log(value / low) / length,
        [tick for tick in ticks if low <= tick <= high],
    )


def _document(title: str, note: str, height: float, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f'height="{height:.0f}" role="img" font-family="system-ui, sans-serif" font-size="12">'
        f"<title>{escape(title)}</title><desc>{escape(note)}</desc>"
        f'<rect width="100%" height="100%" fill="#ffffff"/>'
        f"{_text(_MARGIN, 26, title, weight='600', size=16)}{_text(_MARGIN, 46, note)}{body}</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "400", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" '
        f'fill="{_INK}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1, dash: str = "") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width}" '
        f'stroke-dasharray="{dash}"/>'
    )


def _mark(x: float, y: float, style: int, label: str) -> str:
    """The mark of a series; hovering over it shows `label`."""
    color, shape = _COLORS[style % len(_COLORS)], _SHAPES[style % len(_SHAPES)]
    return (
        f'<path d="{shape}" transform="translate({x:.1f} {y:.1f})" fill="{color}" stroke="{color}" '
        f'stroke-width="1.5"><title>{escape(label)}</title></path>'
    )


def _number(value: float) -> str:
    """Three digits if the number is small, all digits if it is large: 0.25, 1.5, 512, 12,300."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
