"""The pages that people read first: short, without broken links, and consistent with the code."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

import moe_edu
from moe_edu import MoEConfig
from moe_edu.cli import main
from moe_edu.data import load_corpus
from moe_edu.exercises.registry import all_exercises
from moe_edu.model.pretrained import SHIPPED

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moe_edu"
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
each_page = pytest.mark.parametrize("page", PAGES)


def read(page):
    return (ROOT / page).read_text("utf-8")


def load(path):
    """Load a module that belongs to no package."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def json_of(path):
    return json.loads(path.read_text("utf-8"))


def joined(page):
    """The text with line breaks replaced by spaces."""
    return " ".join(read(page).split())


@each_page
class TestEveryPage:
    def test_links_lead_to_files(self, page):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", read(page)):
            assert ((ROOT / page).parent / target).exists(), target

    def test_tests_that_it_names_exist(self, page):
        tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
        for name in re.findall(r"`(Test\w+|test_\w+)`", read(page)):
            assert re.search(rf"(class|def) {name}\b", tests), name

    def test_files_that_it_names_exist(self, page):
        text = re.sub(r"https?://\S+", "", read(page))
        for path in re.findall(r"\b((?:moe_edu|tests|docs|notebooks)/[\w/]+\.\w+)", text):
            is_example = re.search(r"my_explorer|lesson_11", path)
            assert is_example or (ROOT / path).is_file(), path

    def test_modules_that_it_runs_exist(self, page):
        for module in re.findall(r"python -m (moe_edu\.[\w.]+)", read(page)):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module

    def test_targets_of_make_that_it_names_exist(self, page):
        targets = re.findall(r"^([a-z]+):", read("Makefile"), re.M)
        for target in re.findall(r"(?:^|`)make ([a-z]+)", read(page), re.M):
            assert target in targets, target

    def test_commands_and_options_that_it_names_exist(self, page):
        text = read(page).replace("\\\n", " ")
        for line in re.findall(r"(?:^|`)moe-edu ([^`#\n]+)", text, re.M):
            name, *words = line.split(" -- ")[0].split()
            command = main.get_command(None, name)
            if name == "bench" and words:
                command = command.commands[words[0]]
            assert command, line
            options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
            assert {word for word in words if word.startswith("--")} <= options | {"--help"}, line


class TestReadme:
    def test_is_one_short_page(self):
        assert (ROOT / "README.md").stat().st_size <= 8192

    def test_counts_the_exercises(self):
        real_bugs = sum(bool(exercise.origin) for exercise in all_exercises())
        assert f"**Exercises**, {len(all_exercises())} of them" in joined("README.md")
        assert f"{real_bugs} are real bugs from published code" in joined("README.md")

    def test_names_every_lesson(self):
        for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
            assert f"(notebooks/{path.name})" in read("README.md")

    def test_leads_to_every_page(self):
        leads = set(re.findall(r"\]\(((?:docs/)?\w+\.md)\)", read("README.md")))
        assert leads >= set(PAGES) - {"README.md", "docs/index.md", "docs/api.md"}

    def test_tells_windows_users_what_to_type(self):
        """Without make: the packages and the command that `make lab` uses."""
        assert 'python -m pip install -c constraints.txt -e ".[lab]"' in read("README.md")
        assert '-c constraints.txt -e ".[lab]"' in read("Makefile")
        assert re.search(r"^moe-edu lab$", read("README.md"), re.M)

    def test_the_package_runs_as_shown(self):
        """Runs all lines before the two that need the reader's own checkpoint."""
        (code,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.S)
        shown = re.search(r"(translator\.translate\(.*?\)) +# ('.*')", code)
        names = {}
        exec(code.partition("encoder =")[0], names)
        assert eval(shown[1], names) == ast.literal_eval(shown[2])
        assert names["output"].shape == (2, 6, 64)
        assert names["routing"].kept.shape == (12, 2)
        assert hasattr(moe_edu.MoEEncoder, "load_hf_state_dict")


class TestModelCard:
    def test_scores_are_those_of_the_model(self):
        result = json_of(SHIPPED / "result.json")
        text, test = joined("docs/model_card.md"), result["test"]
        assert f"| shipped | {result['steps']:,} | 1,348 s on one shared core |" in text
        assert round(result["seconds"]) in (1347, 1348)
        assert f"| {test['chrf']:.1f} | {test['exact_match']:.2f} | {test['sentences']:,} |" in text
        assert f"{result['parameters']:,} parameters" in text
        assert f"({result['peak_rss_mb']} MB)" in text
        kinds = sorted(scores["exact_match"] for scores in test["by_kind"].values())
        assert f"exact match {kinds[-1]:.2f}" in text
        assert f"({kinds[0]:.2f})" in text
        languages = sorted(scores["chrf"] for scores in test["by_source_language"].values())
        assert f"(chrF++ {languages[-1]:.1f})" in text
        assert f"({languages[0]:.1f})" in text
        assert f"translates {len(languages)} languages into English" in text

    def test_settings_are_those_of_the_model(self):
        settings = json_of(SHIPPED / "result.json")["settings"]
        (command,) = re.findall(r"moe-edu train --out runs/shipped (.*?)```", joined("docs/model_card.md"))
        given = dict(re.findall(r"--([\w-]+) (\S+)", command))
        for option in ("steps", "batch-tokens", "learning-rate", "warmup-steps", "eval-every"):
            assert float(given[option]) == settings[option.replace("-", "_")], option

    def test_counts_are_those_of_the_corpus(self):
        corpus, text = load_corpus(), joined("docs/model_card.md")
        meanings = sum(len(table.rows) for table in (corpus.train, corpus.valid, corpus.test))
        assert f"{meanings:,} meanings make {meanings * len(corpus.languages):,} sentences" in text
        assert f"in {len(corpus.languages)} languages" in text


class TestDifferences:
    def test_names_a_test_for_each_defect(self):
        rows = [
            line
            for line in read("docs/differences.md").splitlines()
            if re.search(r"\| `[Tt]est\w+` \|$", line)
        ]
        assert len(rows) >= 12

    def test_defaults_differ_where_it_says(self):
        from transformers import NllbMoeConfig

        ours, theirs = MoEConfig(), NllbMoeConfig()
        shared = [name for name in MoEConfig.__dataclass_fields__ if hasattr(theirs, name)]
        differ = {
            name: getattr(ours, name) for name in shared if getattr(ours, name) != getattr(theirs, name)
        }
        assert differ == {"expert_capacity": None, "router_aux_loss_coef": 0.01}
        assert (theirs.expert_capacity, theirs.router_aux_loss_coef) == (64, 0.001)

    def test_shows_what_the_command_prints(self, capsys):
        from moe_edu.experiments import experts_that_run

        experts_that_run.main()
        assert f"```text\n{capsys.readouterr().out}```" in read("docs/differences.md")


class TestBenchmarks:
    def test_every_table_has_machine_date_commit_and_command(self):
        for section in read("docs/benchmarks.md").split("\n## ")[1:]:
            if re.search(r"^\| .*\d.*\|$", section, re.M):
                assert re.search(r"^\*.*(EPYC|Xeon|same machine)", section, re.M), section[:40]
                assert re.search(r"commit|date and commit", section)
                assert "\nmoe-edu bench " in section


def test_changelog_leads_to_modules_that_exist():
    rows = re.findall(r"^\| (`moe_edu\..*) \| (`moe_edu\..*) \|$", read("CHANGELOG.md"), re.M)
    assert len(rows) >= 14
    for before, now in rows:
        names = re.findall(r"`(moe_edu\.)?([\w.]+?)\.?`", now)
        (_, first), *others = names
        if "with the same name" in now:
            room, files = (
                first,
                [name.split(".")[-1] for _, name in re.findall(r"`(moe_edu\.)?([\w.]+)`", before)],
            )
        else:
            room, file = first.split(".")
            files = [file, *(name for _, name in others)]
        for file in files:
            assert (PACKAGE / room / f"{file}.py").is_file(), (before, now)


class TestApi:
    def test_has_every_public_name_once(self):
        entries = re.findall(r"^\.\. auto\w+:: moe_edu\.(\w+)$", read("docs/api.md"), re.M)
        assert sorted(entries) == sorted(moe_edu.__all__)


def test_the_site_has_every_page():
    build = load(ROOT / "docs" / "build.py")
    pages = build.pages()
    assert {*PAGES} - {"README.md"} <= pages.keys()
    front = read("docs/index.md")
    for page in pages.values():
        name = page.partition(".")[0]
        assert name == "index" or name[:2].isdigit() or f"\n{name}\n" in front, name
    text = (
        "[a](../CONTRIBUTING.md#the-map) [b](../tests/conftest.py) [c](benchmarks.md) [d](https://a.b/c.md)"
    )
    github = build.REPOSITORY + "/blob/main"
    assert build.with_links(text, "docs/differences.md") == (
        f"[a](contributing.md#the-map) [b]({github}/tests/conftest.py) [c](benchmarks.md) [d](https://a.b/c.md)"
    )
