"""The site, built from the saved notebooks: complete, offline, without broken links, interactive without a kernel."""

import functools
import itertools
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from axe_playwright_python.sync_playwright import Axe

import moe_edu

ROOT = Path(__file__).parents[2]
LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    output = tmp_path_factory.mktemp("site") / "html"
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", output], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return output


class References(HTMLParser):
    """The addresses that a page loads, those that it links to, and its ids."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids.add(values.get("id"))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon"):
            self.loads.append(values["href"])
        if tag in ("script", "img", "iframe") and values.get("src"):
            self.loads.append(values["src"])


@pytest.fixture(scope="module")
def pages(site):
    return {path: References(path.read_text("utf-8")) for path in site.glob("*.html")}


class TestBuiltSite:
    def test_has_a_page_for_every_lesson(self, site):
        assert all(
            (site / f"{lesson}.html").is_file() for lesson in [*LESSONS, "index", "glossary", "search"]
        )

    def test_has_the_pages_that_the_readme_leads_to(self, site):
        pages = ("api", "benchmarks", "changelog", "contributing", "differences", "model_card", "teaching")
        assert all((site / f"{page}.html").is_file() for page in pages)

    def test_every_public_name_has_its_entry(self, pages):
        (api,) = (page for path, page in pages.items() if path.stem == "api")
        assert {f"moe_edu.{name}" for name in moe_edu.__all__} <= api.ids

    def test_is_small(self, site):
        assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 15_000_000

    def test_loads_nothing_from_elsewhere(self, pages):
        for path, page in pages.items():
            for address in page.loads:
                assert not re.match(r"(https?:)?//", address), (path.name, address)

    def test_every_link_inside_leads_somewhere(self, pages):
        for path, page in pages.items():
            for address in page.loads + page.links:
                if re.match(r"(https?:|data:|mailto:|//)", address):
                    continue
                file, anchor = urldefrag(unquote(address))
                target = (path.parent / file.partition("?")[0]).resolve() if file else path
                assert target.is_file(), (path.name, address)
                if anchor and target in pages:
                    assert anchor in pages[target].ids, (path.name, address)

    def test_lessons_lead_to_each_other(self, pages):
        by_name = {path.stem: page for path, page in pages.items()}
        for earlier, later in itertools.pairwise(LESSONS):
            assert f"{later}.html" in by_name[earlier].links
            assert f"{earlier}.html" in by_name[later].links


@pytest.fixture(scope="module", params=["file", pytest.param("server", marks=pytest.mark.nightly)])
def address(request, site):
    """The site's address: on disk, where browsers are strictest, and on a plain local server."""
    if request.param == "file":
        yield site.as_uri()
        return
    handler = functools.partial(SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def page(browser, address, patience_ms):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(patience_ms)
    page.complaints, page.elsewhere = [], []
    page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda r: r.url.startswith((address, "data:")) or page.elsewhere.append(r.url))
    yield page
    page.close()


@pytest.mark.browser
class TestInTheBrowser:
    def test_every_explorer_works_without_a_kernel(self, page, address):
        for name in ("index", *LESSONS):
            page.goto(f"{address}/{name}.html")
            explorers = page.locator(".moe-x")
            for i in range(explorers.count()):
                explorer = explorers.nth(i)
                assert explorer.get_attribute("data-mounted") == "true", name
                control = explorer.locator("input[type=range], select, [role=slider]").first
                before = explorer.locator("svg").inner_html()
                control.press("End")
                if explorer.locator("svg").inner_html() == before:
                    control.press("Home")
                assert explorer.locator("svg").inner_html() != before, name
        assert page.complaints == []
        assert page.elsewhere == []

    def test_figures_are_drawn(self, page, address):
        page.goto(f"{address}/07_train_a_multilingual_model.html")
        page.wait_for_selector(".js-plotly-plot .scatterlayer .js-line")
        assert page.elsewhere == []

    def test_search_finds_words(self, page, address):
        page.goto(f"{address}/search.html?q=capacity")
        page.wait_for_selector("#search-results li a")
        assert page.elsewhere == []

    def test_dark_pages_are_dark(self, page, address):
        page.emulate_media(color_scheme="dark")
        page.goto(f"{address}/index.html")
        ink = page.locator(".moe-x text.ink").first.evaluate("e => getComputedStyle(e).fill")
        assert min(map(int, re.findall(r"\d+", ink)[:3])) > 128


# A lesson takes ten seconds; its text and outputs are checked in JupyterLab every day.
EVERY_DAY = ["index", "search", "00_start_here", "07_train_a_multilingual_model"]


@pytest.mark.browser
@pytest.mark.parametrize(
    "stems", [EVERY_DAY, pytest.param(None, marks=pytest.mark.nightly)], ids=["some", "all"]
)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_barrier(browser, site, theme, stems, patience_ms):
    context = browser.new_context(color_scheme=theme, viewport={"width": 1280, "height": 900})
    context.set_default_timeout(patience_ms)
    found = []
    for path in [site / f"{stem}.html" for stem in stems] if stems else sorted(site.glob("*.html")):
        page = context.new_page()
        page.goto(path.as_uri())
        violations = Axe().run(page).response["violations"]
        found += [(path.name, violation["id"], violation["nodes"][0]["html"]) for violation in violations]
        page.close()
    context.close()
    assert found == []
