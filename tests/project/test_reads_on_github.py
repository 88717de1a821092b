"""A saved notebook as GitHub shows it: no scripts, styles or inline drawings; pictures and words remain.

Modelled on the list of html-pipeline (`lib/html/pipeline/sanitization_filter.rb`, github.com/gjtorikian/html-pipeline),
but stricter: nothing here keeps a class, an id or a handler. Notebooks keep `data:` pictures, including base64 SVG
(github.com/activeviam/atoti-notebooks, issue 425), and lose the contents of `<style>`, as pandas tables show.
"""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest

from moe_edu.explorers import NAMES, get

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
# The output types that GitHub draws, best first.
DRAWN = ("text/html", "image/png", "image/svg+xml", "image/jpeg", "text/markdown", "text/latex")

ELEMENTS = re.compile(
    "h[1-6]|br?|i|strong|em|a|pre|code|img|tt|div|ins|del|su[bp]|p|[ou]l|table|thead|tbody|tfoot|blockquote|d[ldt]|"
    "kbd|q|samp|var|hr|ruby|rt|rp|li|t[rdh]|s|strike|summary|details"
)
ATTRIBUTES = {
    "href",
    "src",
    "alt",
    "align",
    "width",
    "height",
    "colspan",
    "rowspan",
    "scope",
    "title",
    "dir",
    "lang",
}
WITHOUT_CONTENTS = {"script", "style", "svg", "math", "iframe", "object"}
PICTURE = "data:image/svg+xml;base64,"


class Github(HTMLParser):
    """The parts of HTML that remain: its pictures and its words."""

    def __init__(self, html):
        super().__init__()
        self.pictures, self.words, self.kept = [], "", ""
        self._inside = []  # elements that are dropped with their contents
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag in WITHOUT_CONTENTS:
            self._inside.append(tag)
        if self._inside or not ELEMENTS.fullmatch(tag):
            return
        attributes = {name: value for name, value in attributes if name in ATTRIBUTES}
        if not re.match(
            r"https?:|data:image/|[\w./#-]+$", attributes.get("src", attributes.get("href", "#"))
        ):
            return
        if tag == "img":
            self.pictures.append(attributes)
        self.kept += f"<{tag} {attributes}>"

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.words += data
            self.kept += data


def outputs(path):
    """(cell, data of an output) of a notebook, for every output that has data."""
    notebook = nbformat.read(path, as_version=4)
    return [(cell, out.data) for cell in notebook.cells for out in cell.get("outputs", ()) if "data" in out]


def explorers_of(path):
    """(name, HTML) of each explorer that a notebook shows."""
    found = []
    for cell, data in outputs(path):
        if match := re.match(r'<div class="moe-x" data-explorer="(\w+)"', data.get("text/html", "")):
            assert "explorers.show(" in cell.source
            found.append((match[1], data["text/html"]))
    return found


def test_the_model_of_github_removes_what_github_removes():
    github = Github(
        '<style>p { color: red }</style><div class="x" id="y" style="color: red" onclick="f()">a<span> b</span></div>'
        '<script>document.write("c")</script><svg><text>d</text></svg><img src="javascript:f()" alt="e">'
        '<img src="data:image/png;base64,AA" alt="f" onerror="g()">'
    )
    assert github.words == "a b"
    assert github.pictures == [{"src": "data:image/png;base64,AA", "alt": "f"}]
    assert not re.search("class|id=|style|on(click|error)|script|svg", github.kept)


def test_every_explorer_is_in_a_lesson():
    assert sorted(name for path in NOTEBOOKS for name, _ in explorers_of(path)) == sorted(NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestReadsOnGithub:
    def test_explorers_keep_their_picture_and_their_sentence(self, path):
        shown = explorers_of(path)
        assert shown
        for name, html in shown:
            explorer, github = get(name), Github(html)
            sentence = explorer.view(explorer.state())["sentence"]
            (picture,) = github.pictures
            assert picture["alt"] == sentence
            assert f"{explorer.title}." in github.words
            assert explorer.purpose in github.words
            assert sentence in github.words
            assert picture["width"] == "720"
            assert picture["src"].startswith(PICTURE)
            check_drawing(base64.b64decode(picture["src"].removeprefix(PICTURE)), explorer)

    def test_other_pictures_in_html_keep_their_words(self, path):
        for cell, data in outputs(path):
            html = data.get("text/html", "")
            if html and not html.startswith("<style>"):
                assert Github(html).words.strip(), cell.id
                assert "<svg" not in Github(html).kept

    def test_a_sentence_replaces_what_github_cannot_draw(self, path):
        for cell, data in outputs(path):
            if PLOTLY in data and not set(DRAWN) & set(data):
                assert re.match(r"\w.{30,}\.$", data["text/plain"], re.S), cell.id


def check_drawing(svg, explorer):
    """The drawing is self-contained: well-formed, as high as its stage, with words, and without external parts."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox") == f"0 0 720 {explorer.height}"
    assert len("".join(root.itertext())) > 20
    tags = {element.tag.split("}")[1] for element in root.iter()}
    assert {"text", "rect"} & tags
    assert not tags & {"script", "foreignObject", "image", "use"}
    assert not re.search(rb"url\((?!#)|https?://(?!www\.w3\.org/2000/svg)", svg)
