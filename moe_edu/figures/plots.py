"""Numbers to pictures: pure functions that return a Plotly figure.

Every piece of text that comes from data is escaped. A figure carries a sentence that says what it shows, in
`layout.meta["description"]`, for readers who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_edu.figures.theme import expert_style

# Used only without the style sheet: dark enough on white, light enough on black.
_FALLBACK_INK = "#767676"
_FALLBACK_GRID = "rgba(128,128,128,0.25)"
# A thinner band has no room for its label.
_MIN_LABELLED_HEIGHT = 0.06
_MIN_LABELLED_WIDTH = 0.04
_BAND = "rgba(59,142,208,0.1)"  # of a contour map
_LABEL_HEIGHT = 0.07  # of a line of text, as a share of a sweep's axis


def training_figure(history: Sequence[Mapping[str, Any]], total_steps: int) -> go.Figure:
    """Three curves over the steps of a run: loss, chrF++ on the validation split, and each expert's load.

    Args:
        history: records as `moe_edu.training.loop.train` logs them. The load is that of the first sparse layer.
        total_steps: where the horizontal axis ends.
    """
    fig = make_subplots(
        rows=3,
        shared_xaxes=True,
        row_heights=[0.27, 0.27, 0.46],
        vertical_spacing=0.1,
        subplot_titles=[
            "Loss per target token",
            "chrF++ on validation sentences",
            "Share of the tokens whose first choice is expert …",
        ],
    )
    steps = [record["step"] for record in history]
    losses = [round(record["loss"], 3) for record in history]
    scored = [record for record in history if "valid/chrf" in record]
    fig.add_scatter(
        x=steps, y=losses, mode="lines", row=1, col=1, hovertemplate="step %{x}: %{y}<extra></extra>"
    )
    fig.add_scatter(
        x=[record["step"] for record in scored],
        y=[round(record["valid/chrf"], 1) for record in scored],
        mode="lines+markers",
        cliponaxis=False,
        row=2,
        col=1,
        hovertemplate="step %{x}: %{y}<extra></extra>",
    )
    loads: list[Sequence[float]] = [next(iter(record["expert_load"].values()), []) for record in history]
    for expert, shares in enumerate(zip(*loads, strict=True)):
        style = expert_style(expert)
        fig.add_scatter(
            x=steps,
            y=[round(100 * share, 1) for share in shares],
            mode="lines",
            stackgroup="load",
            fillcolor=style.color,
            line_width=0.5,
            name=style.label,
            hovertemplate=f"{style.label}: %{{y}} %<extra></extra>",
            row=3,
            col=1,
        )
    _label_bands(fig, loads[-1] if loads else [])
    _set_layout(fig, height=488, margin={"l": 48, "r": 48, "t": 36, "b": 44})
    fig.update_traces(line_color=_FALLBACK_INK, marker_color=_FALLBACK_INK)
    for title in fig.layout.annotations[:3]:
        title.update(x=0, xanchor="left", font_size=13, yshift=8)  # clear of the highest tick
    fig.update_xaxes(range=[0, total_steps])
    fig.update_xaxes(title_text="optimizer step", ticklabelstandoff=6, row=3)  # its 0 clear of "0 %"
    fig.update_yaxes(rangemode="tozero", row=1)
    fig.update_yaxes(range=[0, 100], row=2)
    fig.update_yaxes(range=[0, 100], ticksuffix=" %", row=3)
    return _described(fig, describe_history(history))


def describe_history(history: Sequence[Mapping[str, Any]]) -> str:
    """Where a training run stands, in a sentence."""
    if not history:
        return "Nothing has been trained yet."
    last = history[-1]
    scores = [record["valid/chrf"] for record in history if "valid/chrf" in record]
    score = f", chrF++ on validation sentences {scores[-1]:.1f}" if scores else ""
    return f"After {last['step']:,} steps: loss {last['loss']:.2f}{score}."


def load_figure(loads: Mapping[str, Sequence[float]]) -> go.Figure:
    """One bar per run, divided into the shares (0 to 1) of the first choices that its experts received."""
    names = list(loads)
    fig = go.Figure()
    for expert, shares in enumerate(zip(*loads.values(), strict=True)):
        style = expert_style(expert)
        fig.add_bar(
            y=names,
            x=[round(100 * share, 1) for share in shares],
            orientation="h",
            marker={"color": style.color, "line": {"color": _FALLBACK_INK, "width": 1}},
            text=[style.label if share >= _MIN_LABELLED_WIDTH else "" for share in shares],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            insidetextfont_color=style.ink,
            hovertemplate=f"{style.label}: %{{x}} %<extra>%{{y}}</extra>",
        )
    _set_layout(fig, height=96 + 44 * len(names), margin={"l": 8, "r": 24, "t": 8, "b": 44})
    fig.update_layout(barmode="stack", bargap=0.35)
    fig.update_xaxes(range=[0, 100], ticksuffix=" %", title_text="share of the first choices")
    fig.update_yaxes(autorange="reversed", automargin=True, showgrid=False, ticksuffix="  ")
    described = (
        f"{name}: the busiest expert is the first choice of {max(shares):.0%} of the tokens"
        for name, shares in loads.items()
    )
    return _described(fig, "; ".join(described) + ".")


def drop_rate_figure(
    rates: Sequence[Sequence[float]], factors: Sequence[float], skews: Sequence[float]
) -> go.Figure:
    """The drop-rate surface as a contour map: the share of the tokens that no expert takes.

    Args:
        rates: shares from 0 to 1, one row per skew and one column per capacity factor, as
            `moe_edu.analysis.drop_rates.drop_rates` returns them.
        factors: capacity factors.
        skews: skews of the router.
    """
    fig = go.Figure(
        go.Contour(
            x=list(factors),
            y=list(skews),
            z=[[round(rate, 3) for rate in row] for row in rates],
            # Plotly draws its bands on top of each other: each adds a little colour.
            colorscale=[[0, "rgba(59,142,208,0)"], [0.05, _BAND], [1, _BAND]],
            contours={"start": 0.1, "end": 0.9, "size": 0.1, "showlabels": True, "labelformat": ".0%"},
            line={"color": _FALLBACK_INK, "width": 1},
            showscale=False,  # the lines are labelled
            hovertemplate="factor %{x}, skew %{y}: %{z:.1%} dropped<extra></extra>",
        )
    )
    fig.add_contour(
        x=list(factors),
        y=list(skews),
        z=[[round(rate, 3) for rate in row] for row in rates],
        contours={
            "start": 0.01,
            "end": 0.01,
            "size": 1,
            "coloring": "none",
            "showlabels": True,
            "labelformat": ".0%",
        },
        line={"color": _FALLBACK_INK, "width": 2},
        hoverinfo="skip",
    )
    _set_layout(fig, height=360, margin={"l": 56, "r": 24, "t": 28, "b": 48})
    fig.update_layout(
        title={"text": "Share of the tokens that no expert takes", "x": 0, "xref": "paper", "font_size": 13}
    )
    fig.update_xaxes(title_text="capacity factor")
    fig.update_yaxes(title_text="skew")
    flat = [
        (rate, factor, skew)
        for skew, row in zip(skews, rates, strict=True)
        for factor, rate in zip(factors, row, strict=True)
    ]
    worst, factor, skew = max(flat, key=lambda cell: cell[0])
    none = sum(rate == 0 for rate, *_ in flat)
    return _described(
        fig,
        f"At most {worst:.0%} of the tokens are dropped, with capacity factor {factor:g} and skew {skew:g}; "
        f"none in {none} of {len(flat)} settings.",
    )


def score_figure(scores: Mapping[str, float]) -> go.Figure:
    """One dot per name on a scale from 0 to 100, the best on top."""
    ranked = sorted(scores.items(), key=lambda item: item[1], reverse=True)
    values = [round(value, 1) for _, value in ranked]
    fig = go.Figure(
        go.Scatter(
            x=values,
            y=[name for name, _ in ranked],
            mode="markers+text",
            # A leading space separates the number from the dot.
            text=[f"\u2002{value:.0f}" for value in values],
            textposition="middle right",
            textfont_size=11,
            marker={"color": _FALLBACK_INK, "size": 8},
            hovertemplate="%{y}: %{x}<extra></extra>",
        )
    )
    _set_layout(fig, height=76 + 16 * len(ranked), margin={"l": 8, "r": 24, "t": 8, "b": 44})
    fig.update_xaxes(range=[-2, 105], title_text="chrF++ on test sentences")
    fig.update_yaxes(autorange="reversed", automargin=True, tickmode="linear", tickfont_size=11)
    (best, top), (worst, bottom) = ranked[0], ranked[-1]
    return _described(fig, f"From {best} with {top:.1f} down to {worst} with {bottom:.1f}.")


def sweep_figure(
    lines: Mapping[str, Mapping[float, Sequence[float]]], x_title: str, y_title: str, top: float = 1.0
) -> go.Figure:
    """A dot for every run and a line through the means, on a logarithmic horizontal axis.

    Args:
        lines: name -> setting -> one value per seed, such as `{"recall": {1: [0.5, 0.52], 8: [0.6, 0.61]}}`.
        x_title, y_title: of the axes.
        top: where the vertical axis, which begins at 0, ends.
    """
    fig = go.Figure()
    ends, heights = [], {}
    for (name, runs), symbol, dash in zip(
        lines.items(),
        ("circle", "diamond-open", "square", "x"),
        ("solid", "dash", "dot", "dashdot"),
        strict=False,
    ):
        settings = sorted(runs)
        means = [round(fmean(runs[setting]), 3) for setting in settings]
        dots = [(setting, value) for setting in settings for value in runs[setting]]
        fig.add_scatter(
            x=[setting for setting, _ in dots],
            y=[round(value, 3) for _, value in dots],
            mode="markers",
            marker={"color": _FALLBACK_INK, "size": 6, "symbol": symbol},
            hovertemplate=f"{escape(name)}: %{{y}}<extra>%{{x}}</extra>",
        )
        fig.add_scatter(x=settings, y=means, mode="lines", hoverinfo="skip", line_dash=dash, line_width=1.5)
        heights[name] = means[-1]
        ends.append(
            f"{name} goes from {means[0]:.2f} at {settings[0]:g} to {means[-1]:.2f} at {settings[-1]:g}"
        )
    for name, y in spread_apart(heights, _LABEL_HEIGHT * top).items():
        fig.add_annotation(
            text=escape(name), x=1.01, xref="paper", xanchor="left", y=y, showarrow=False, font_size=12
        )
    ticks = sorted({setting for runs in lines.values() for setting in runs})
    _set_layout(fig, height=356, margin={"l": 56, "r": 148, "t": 16, "b": 56})
    fig.update_traces(line_color=_FALLBACK_INK)
    fig.update_xaxes(
        type="log",
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
        title_text=x_title,
        showgrid=False,
    )
    fig.update_yaxes(range=[-0.02 * top, 1.02 * top], title_text=y_title)  # with a grid line at both ends
    return _described(fig, "; ".join(ends) + ".")


def spread_apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """The same heights, each raised as far as needed to be `gap` above the one below."""
    placed: dict[str, float] = {}
    lowest = -math.inf
    for name in sorted(heights, key=lambda name: heights[name]):
        placed[name] = max(heights[name], lowest)
        lowest = placed[name] + gap
    return {name: placed[name] for name in heights}


def dots_figure(
    runs: Mapping[str, Sequence[float]], x_title: str, *, digits: int = 2, from_zero: bool = True
) -> go.Figure:
    """A row per name, with a dot per run and a labelled bar at the mean; in the order given.

    Args:
        digits: decimals of the means.
        from_zero: begin the axis at 0; otherwise it covers only the dots.
    """
    fig = go.Figure()
    means = {name: fmean(values) for name, values in runs.items()}
    fig.add_scatter(
        x=[round(value, 3) for values in runs.values() for value in values],
        y=[name for name, values in runs.items() for _ in values],
        mode="markers",
        marker={"color": _FALLBACK_INK, "size": 6},
        hovertemplate="%{y}: %{x}<extra></extra>",
    )
    fig.add_scatter(
        x=[round(mean, 3) for mean in means.values()],
        y=list(means),
        mode="markers+text",
        marker={"color": _FALLBACK_INK, "size": 16, "symbol": "line-ns-open"},
        text=[f"{mean:.{digits}f}" for mean in means.values()],
        textposition="top center",
        textfont_size=11,
        cliponaxis=False,
        hoverinfo="skip",
    )
    _set_layout(fig, height=104 + 34 * len(runs), margin={"l": 8, "r": 24, "t": 20, "b": 56})
    fig.update_xaxes(title_text=x_title, rangemode="tozero" if from_zero else "normal")
    fig.update_yaxes(type="category", autorange="reversed", automargin=True, ticksuffix="  ")
    return _described(fig, "; ".join(f"{name}: {mean:.{digits}f}" for name, mean in means.items()) + ".")


def _label_bands(fig: go.Figure, shares: Sequence[float]) -> None:
    """Name each expert at the right end of its band."""
    bottom = 0.0
    for expert, share in enumerate(shares):
        if share >= _MIN_LABELLED_HEIGHT:
            fig.add_annotation(
                text=expert_style(expert).label,
                x=1.01,
                xref="paper",
                xanchor="left",
                y=100 * (bottom + share / 2),
                yref="y3",
                showarrow=False,
                font_size=12,
            )
        bottom += share


def _set_layout(fig: go.Figure, height: int, margin: Mapping[str, int]) -> None:
    """What all our figures share: no template (1 KB instead of 7), a transparent background, thin axes."""
    fig.update_layout(
        template="none",
        height=height,
        margin=dict(margin),
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 12, "color": _FALLBACK_INK, "family": "system-ui, sans-serif"},
    )
    for update in (fig.update_xaxes, fig.update_yaxes):
        update(zeroline=False, fixedrange=True, gridcolor=_FALLBACK_GRID)


def _described(fig: go.Figure, description: str) -> go.Figure:
    fig.update_layout(meta={"description": description})
    return fig
