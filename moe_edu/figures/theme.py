"""One visual language: what an expert looks like, and the style sheet of every picture in a notebook.

An expert is a number, a colour and a mark, the same in every picture. Colours are Okabe and Ito's, which colour-blind
readers can tell apart (https://jfly.uni-koeln.de/color/), with grey instead of black so that they show on light and
on dark pages. Text and lines take their colour from the page: from JupyterLab's variables, elsewhere from the text
around them.
"""

from __future__ import annotations

from typing import NamedTuple

EXPERT_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_MARKS = ("●", "■", "▲", "◆", "▼", "★", "✚", "⬢")
_OPEN_MARKS = ("○", "□", "△", "◇", "▽", "☆", "✛", "⬡")


class ExpertStyle(NamedTuple):
    """How an expert is drawn.

    Attributes:
        label: its mark and number, "● 0".
        color: fill, `#rrggbb`.
        ink: black or white, whichever is easier to read on `color`.
    """

    label: str
    color: str
    ink: str


def expert_style(expert: int) -> ExpertStyle:
    """The look of expert number `expert`; beyond eight, the colours repeat and the marks change."""
    turn, place = divmod(expert, len(EXPERT_COLORS))
    color = EXPERT_COLORS[place]
    marks = _MARKS if turn % 2 == 0 else _OPEN_MARKS
    ink = max("#000000", "#FFFFFF", key=lambda candidate: contrast_ratio(color, candidate))
    return ExpertStyle(f"{marks[place]} {expert}", color, ink)


def contrast_ratio(first: str, second: str) -> float:
    """Contrast of two `#rrggbb` colours, from 1 to 21 (WCAG 2.2, "contrast ratio")."""
    darker, lighter = sorted((_luminance(first), _luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: str) -> float:
    """Relative luminance, 0 to 1 (WCAG 2.2)."""
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


# Plotly writes its colours into each element, so the page's colours need !important. The arrow of a dropdown is black
# in ipywidgets, on any page.
STYLE_SHEET = """
[data-jp-theme-light="false"] { --jp-widgets-dropdown-arrow: url("data:image/svg+xml,%3Csvg \
xmlns='http://www.w3.org/2000/svg' viewBox='0 0 18 18'%3E%3Cpath fill='%23e0e0e0' \
d='M5.2 5.9 9 9.7l3.8-3.8 1.2 1.2-5 4.9-5-4.9z'/%3E%3C/svg%3E"); }
.moe {
  --moe-ink: var(--jp-content-font-color1, currentColor);
  --moe-line: var(--jp-border-color1, rgba(128, 128, 128, 0.6));
  color: var(--moe-ink); font-size: 14px; line-height: 1.4; max-width: 720px;
}
.moe table.moe-table { border-collapse: collapse; margin: 4px 0; font-size: 13px; width: auto; }
.moe table.moe-table th, .moe table.moe-table td {
  text-align: left; vertical-align: top; padding: 4px 12px 4px 0; border: 0; white-space: normal;
  overflow-wrap: anywhere; max-width: 320px; border-bottom: 1px solid var(--moe-line);
  color: var(--moe-ink); background: transparent;
}
.moe table.moe-table tbody tr { background: none; }
.moe table.moe-table caption { text-align: left; padding-bottom: 4px; }
.moe table.moe-table th { font-weight: 600; }
.moe table.moe-table th, .moe table.moe-table td:first-child { overflow-wrap: normal; }
.moe table.moe-table .moe-num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.moe table.moe-table th.moe-num { white-space: normal; }
.moe table.moe-table .moe-whole { max-width: none; }
.moe table.moe-table .moe-right { font-weight: 600; }
.moe .moe-chips { margin: 8px 0; }
.moe .moe-token { font-family: var(--jp-code-font-family, monospace); font-size: 13px; white-space: pre; }
.moe .moe-choice { font-size: 12px; min-width: 34px; white-space: nowrap; border-color: var(--moe-ink) !important; }
.moe .moe-first { border-radius: 4px 4px 0 0; }
.moe .moe-second { border-top: 0 !important; border-radius: 0 0 4px 4px; background-clip: padding-box !important; }
.moe .moe-plain { min-width: 34px; border-color: currentColor !important; border-radius: 4px; }
.moe .moe-choice b { font-weight: 600; }
.moe .moe-no-room {
  background: repeating-linear-gradient(-45deg, transparent 0 4px, rgba(128, 128, 128, 0.45) 4px 6px) !important;
  color: var(--moe-ink) !important;
}
.moe .moe-answer { font-size: 18px; margin: 8px 0; min-height: 1.4em; }
.moe .moe-note { font-size: 13px; margin: 4px 0; }
.moe .moe-error { border-left: 3px solid currentColor; padding-left: 8px; }
.js-plotly-plot { max-width: 720px; }
.js-plotly-plot .main-svg text:not(.bartext) { fill: var(--jp-content-font-color1, currentColor) !important; }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path {
  stroke: var(--jp-content-font-color1, currentColor) !important; stroke-opacity: 0.15 !important;
}
.js-plotly-plot .scatterlayer path.js-line {
  stroke: var(--jp-content-font-color1, currentColor) !important;
}
.js-plotly-plot .contourlines path { stroke: var(--jp-content-font-color1, currentColor) !important; }
.js-plotly-plot .scatterlayer path.point {
  fill: var(--jp-content-font-color1, currentColor) !important; stroke: none !important;
}
.js-plotly-plot .scatterlayer path.point[style*="fill: none"] {
  fill: none !important; stroke: var(--jp-content-font-color1, currentColor) !important;
}
"""
