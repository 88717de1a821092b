"""Build the site from the saved notebooks: `python docs/build.py OUTPUT`, or `make site`. No network, no kernel."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import tomllib
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import plotly
from sphinx.cmd.build import main as sphinx

from moe_edu import explorers

DOCS = Path(__file__).parent
NOTEBOOKS = DOCS.parent / "notebooks"
PYPROJECT = tomllib.loads((DOCS.parent / "pyproject.toml").read_text("utf-8"))
REPOSITORY = PYPROJECT["project"]["urls"]["Repository"]
PLOTLY_JSON = "application/vnd.plotly.v1+json"


def build(output: Path) -> int:
    """Assemble the sources in a folder of their own and run Sphinx, warnings being errors."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        for name in ("conf.py", "static", "teaching.md"):
            copy = shutil.copytree if (DOCS / name).is_dir() else shutil.copy
            copy(DOCS / name, source / name)
        shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", source / "static")
        shutil.copytree(NOTEBOOKS / "images", source / "images")
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            notebook = nbformat.read(path, as_version=4)
            for cell in notebook.cells:
                if cell.cell_type == "markdown":  # files that are no page of the site are on GitHub
                    cell.source = cell.source.replace("](../", f"]({REPOSITORY}/blob/main/")
            nbformat.write(with_plotly_in_html(notebook, path.stem), source / path.name)
        front = (DOCS / "index.md").read_text("utf-8")
        (source / "index.md").write_text(
            front.replace("EXPLORER", explorers.get("router_board").html()), "utf-8"
        )
        return sphinx(["-q", "-W", "--keep-going", "-b", "html", str(source), str(output)])


def with_plotly_in_html(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """Put each Plotly figure into HTML that the site's own copy of plotly.js draws; in place."""
    figures = 0
    for cell in notebook.cells:
        for out in cell.get("outputs", ()):
            if PLOTLY_JSON in out.get("data", {}):
                out.data = {"text/html": plotly_html(out.data, f"{name}-figure-{figures}")}
                figures += 1
    return notebook


def plotly_html(data: dict[str, Any], name: str) -> str:
    """A figure as a named picture with its description, drawn when the page has loaded."""
    figure = data[PLOTLY_JSON]
    content = json.dumps([figure["data"], figure["layout"]]).replace("<", "\\u003c")
    return (
        f'<div id="{escape(name)}" role="img" aria-label="{escape(data["text/plain"])}"></div>'
        f'<script>addEventListener("DOMContentLoaded", () => Plotly.newPlot("{escape(name)}", ...{content}, '
        "{displayModeBar: false, responsive: true}));</script>"
    )


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1])))
