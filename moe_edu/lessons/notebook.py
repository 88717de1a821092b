"""How a notebook starts, takes its parameters, and shows pictures in JupyterLab, Binder and Colab alike."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

import plotly.graph_objects as go
import torch
from IPython.display import display
from ipywidgets import Widget

from moe_edu.figures.theme import STYLE_SHEET
from moe_edu.lessons.service import COLAB, advise, find_service
from moe_edu.system.requirements import find_lacks, requirements_of

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PARAMETERS_MARK = "# Parameters"  # how papermill begins the cell that it injects


class UnknownParameterError(ValueError):
    """A parameter was given that the notebook does not have."""


def begin() -> None:
    """Prepare the notebook: our style sheet, and one CPU thread so that results repeat.

    Prints what is too old, and on Colab and Kaggle where to get a GPU if there is none.
    """
    torch.set_num_threads(1)
    service = find_service()
    if service is COLAB:
        from google.colab import output  # type: ignore[import-not-found]

        output.enable_custom_widget_manager()
    show(f"<style>{STYLE_SHEET}</style>")
    lacks = find_lacks(requirements_of() + requirements_of("lessons"))
    for line in advise(service, lacks, torch.cuda.is_available()):
        print(line)


def check_parameters(inputs: Sequence[str]) -> None:
    """Refuse parameters that the notebook does not have.

    papermill only warns about them, and a misspelt parameter would leave its default in force.

    Args:
        inputs: the source of the cells run so far, IPython's `In`. The first that begins with "# Parameters" declares
            them; later ones, which papermill injects, may only set those.

    Raises:
        UnknownParameterError: names them, with near matches.
    """
    declared, *injected = ([name for name in inputs if name.startswith(PARAMETERS_MARK)]) or [""]
    known = assigned_names(declared)
    unknown = [name for cell in injected for name in assigned_names(cell) if name not in known]
    if unknown:
        raise UnknownParameterError(
            "; ".join(_unknown_message(name, known) for name in dict.fromkeys(unknown))
        )


def assigned_names(source: str) -> list[str]:
    """The names that the top level of a cell assigns to, in order."""
    targets = (node.targets for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return [target.id for group in targets for target in group if isinstance(target, ast.Name)]


def _unknown_message(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"this notebook has {', '.join(known)}"
    return f"unknown parameter {name!r}; {hint}"


def claim(statement: str, holds: bool) -> None:
    """Print what the lesson claims about a run, ticked if it holds in this run.

    A reader who changed the settings sees where the claim stops holding; nbval, which compares the line, sees where the
    lesson is wrong.
    """
    print(f"{'✓' if holds else '✗ not in this run:'} {statement}")


Picture: TypeAlias = go.Figure | Widget | str


def show(picture: Picture) -> None:
    """Show a figure, a widget, or a string of HTML below the cell."""
    display(as_bundle(picture), raw=True)


def as_bundle(picture: Picture) -> dict[str, Any]:
    """A picture in the form of Jupyter's messages, with plain text for pages that cannot draw it."""
    if isinstance(picture, str):
        return {"text/html": picture, "text/plain": "(a picture in HTML)"}
    if isinstance(picture, Widget):
        # By hand: ipywidgets 7, which Colab has, makes no bundle of a widget.
        view = {"version_major": 2, "version_minor": 0, "model_id": picture.model_id}
        return {WIDGET_VIEW: view, "text/plain": "Run this cell to use its controls."}
    description = picture.layout.meta["description"]
    if find_service() is not None:  # neither Colab nor Kaggle draws Plotly's own format
        return {
            "text/html": picture.to_html(include_plotlyjs="cdn", full_html=False),
            "text/plain": description,
        }
    return {"application/vnd.plotly.v1+json": picture.to_plotly_json(), "text/plain": description}
