"""What every explorer promises, without a browser: a pure function, honest challenges, safe HTML."""

import json
import random
import re
from xml.etree import ElementTree

import pytest

from moe_edu import explorers
from moe_edu.explorers.explorer import STATIC, Choice, Explorer, Grid, Slider, Text, Toggle

each_explorer = pytest.mark.parametrize("name", explorers.NAMES)


def test_there_is_none_that_is_not_listed():
    scripts = {path.stem for path in STATIC.glob("*.js")} - {"kit"}
    pictures = {path.stem for path in (STATIC / "pictures").glob("*.svg")}
    assert scripts == pictures == set(explorers.NAMES)


def test_an_unknown_name_gets_near_ones():
    with pytest.raises(ValueError, match="no explorer 'router_bord'; did you mean router_board"):
        explorers.get("router_bord")


@each_explorer
class TestEveryExplorer:
    def test_carries_its_modules_name(self, name):
        assert explorers.get(name).name == name

    def test_view_is_pure_and_json(self, name):
        explorer = explorers.get(name)
        rng = random.Random(name)
        for _ in range(10):
            state = explorer.random_state(rng)
            before = json.dumps(state)
            view = explorer.view(state)
            assert json.dumps(state) == before
            assert json.loads(json.dumps(view)) == json.loads(json.dumps(explorer.view(state)))
            assert view["sentence"]
            assert len(view["met"]) == len(explorer.challenges)
            assert all(isinstance(met, bool) for met in view["met"])

    def test_has_two_or_three_challenges_that_are_not_met_at_the_start(self, name):
        explorer = explorers.get(name)
        assert 2 <= len(explorer.challenges) <= 3
        assert not any(explorer.view(explorer.state())["met"])

    def test_each_challenge_can_be_met(self, name):
        explorer = explorers.get(name)
        assert len(explorer.solutions) == len(explorer.challenges)
        for challenge, changes in enumerate(explorer.solutions):
            assert explorer.view(explorer.state(**changes))["met"][challenge]

    def test_fits_the_frame(self, name):
        assert explorers.get(name).height <= 420

    def test_shows_a_picture_and_a_sentence_where_scripts_are_stripped(self, name):
        explorer = explorers.get(name)
        stripped = re.sub(r"<script>.*</script>", "", explorer.html(), flags=re.DOTALL)
        assert '<img src="data:image/svg+xml;base64,' in stripped
        assert f'alt="{stripped.split("alt=")[1].split(chr(34))[1]}"' in stripped
        assert "</svg>" in (STATIC / "pictures" / f"{name}.svg").read_text("utf-8")

    def test_the_picture_has_words_only_where_they_are_drawn(self, name):
        """A stray number between shapes is invisible, and read out by screen readers."""
        picture = ElementTree.parse(STATIC / "pictures" / f"{name}.svg")
        for element in picture.iter():
            assert not (element.tail or "").strip()
            if element.tag.split("}")[1] not in ("text", "style"):
                assert not (element.text or "").strip()

    def test_asks_no_other_machine_for_anything(self, name):
        script = explorers.get(name).html().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|import\(|fetch\(|XMLHttpRequest|@import", script)


@pytest.fixture
def explorer():
    return Explorer(
        name="router_board",
        title="<b>Title</b>",
        purpose="Move & see.",
        fields=(
            Slider("size", "Size", 1, 3, 0.5, 2),
            Choice("kind", "Kind", (("a", "A"), ("b", "B")), "a"),
            Toggle("on", "On", False),
            Text("word", "Word", "cat", max_length=5),
            Grid("table", "Table", 0, 1, 0.1, ((0.0, 1.0), (1.0, 0.0))),
        ),
        challenges=("one", "two"),
        view=lambda state: {"sentence": f"You typed {state['word']}.", "met": [False, False]},
        solutions=({}, {}),
        height=100,
    )


class TestState:
    def test_starts_with_the_initial_values(self, explorer):
        initial = {"size": 2, "kind": "a", "on": False, "word": "cat", "table": [[0.0, 1.0], [1.0, 0.0]]}
        assert explorer.state() == initial

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"size": 4}, "router_board.size does not accept 4: numbers from 1 to 3"),
            ({"size": True}, "does not accept True"),
            ({"kind": "c"}, "one of a, b"),
            ({"on": 1}, "True or False"),
            ({"word": "kitten"}, "at most 5 characters"),
            ({"table": [[0.0, 1.0]]}, "numbers from 0 to 1, 2 rows of 2"),
            ({"table": [[0.0, 2.0], [0.0, 0.0]]}, "numbers from 0 to 1"),
            ({"colour": 1}, "router_board has no field 'colour'; it has size, kind, on, word, table"),
        ],
    )
    def test_refuses_what_does_not_fit(self, explorer, changes, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            explorer.state(**changes)

    def test_random_states_are_accepted(self, explorer):
        rng = random.Random(0)
        for _ in range(50):
            state = explorer.random_state(rng)
            assert explorer.state(**state) == state


class TestHtml:
    def test_text_is_escaped(self, explorer):
        html = explorer.html(word="</sc>")
        assert "&lt;b&gt;Title&lt;/b&gt;" in html
        assert "You typed &lt;/sc&gt;." in html
        assert "</sc>" not in html

    def test_is_the_same_each_time(self, explorer):
        assert explorer.html() == explorer.html()


class TestWidget:
    def test_state_is_linked_and_checked(self):
        widget = explorers.get("router_board").widget(temperature=2.0)
        assert widget.state["temperature"] == 2.0
        widget.state = {**widget.state, "choices": "1"}
        assert all(second == -1 for _, second in widget.view["chosen"])
        with pytest.raises(ValueError, match="temperature does not accept 99"):
            widget.state = {**widget.state, "temperature": 99}


def test_show_puts_html_and_a_sentence_below_the_cell(monkeypatch):
    bundles = []
    monkeypatch.setattr("moe_edu.explorers.registry.display", lambda bundle, raw: bundles.append(bundle))
    explorers.show("router_board", temperature=0.5)
    assert "<script>" in bundles[0]["text/html"]
    assert bundles[0]["text/plain"].startswith("The router is most confident about")
