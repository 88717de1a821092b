"""Build the site from the saved notebooks: `python docs/build.py OUTPUT`, or `make site`. No network, no kernel."""

from __future__ import annotations

import json
import posixpath
import re
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
ROOT = DOCS.parent
NOTEBOOKS = ROOT / "notebooks"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
REPOSITORY = PYPROJECT["project"]["urls"]["Repository"]
PLOTLY_JSON = "application/vnd.plotly.v1+json"


def build(output: Path) -> int:
    """Assemble the sources in a folder of their own and run Sphinx, warnings being errors."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        shutil.copy(DOCS / "conf.py", source)
        shutil.copytree(DOCS / "static", source / "static")
        shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", source / "static")
        shutil.copytree(NOTEBOOKS / "images", source / "images")
        for path, page in pages().items():
            if path.endswith(".md"):
                text = with_links((ROOT / path).read_text("utf-8"), path)
                if path == "docs/index.md":
                    text = text.replace("EXPLORER", explorers.get("router_board").html())
                (source / page).write_text(text, "utf-8")
                continue
            notebook = nbformat.read(ROOT / path, as_version=4)
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = with_links(cell.source, path)
            nbformat.write(with_plotly_in_html(notebook, Path(page).stem), source / page)
        return sphinx(["-q", "-W", "--keep-going", "-b", "html", str(source), str(output)])


def pages() -> dict[str, str]:
    """The file in the repository behind each page of the site, and what the page's file is called there."""
    files = [*DOCS.glob("*.md"), *NOTEBOOKS.glob("*.ipynb"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    return {
        path.relative_to(ROOT).as_posix(): path.name.lower() if path.parent == ROOT else path.name
        for path in sorted(files)
    }


def with_links(text: str, path: str) -> str:
    """The text of the repository's file `path`, its links led to pages of the site, and to GitHub for all else."""
    site = pages()

    def lead(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[2]))
        if target in site:
            return f"]({site[target]}{link[3]})"
        return f"]({REPOSITORY}/blob/main/{target}{link[3]})"

    # Relative links but for pictures, which lie beside the pages.
    return re.sub(r"(\]\()(?!https?:|mailto:|images/)([^)#\s]+)((?:#[^)\s]*)?)\)", lead, text)


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
