"""pyproject.toml has the repository's address; every badge, link and install line follows it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe_edu.lessons.address import (
    FIRST_LESSON,
    badge_link,
    main,
    names_in,
    project_texts,
    read_name,
    renewed,
    rewrite,
    stale_lines,
)

ROOT = Path(__file__).parents[2]
NAME = read_name((ROOT / "pyproject.toml").read_text("utf-8"))
OTHER = "a-school/its.own-copy"
TEXTS = project_texts(ROOT)


def test_no_line_is_stale():
    stale = [f"{line.file}:{line.number}: {line.found}" for line in stale_lines(TEXTS, NAME)]
    assert not stale, "run `python -m moe_edu.lessons.address`; stale are\n" + "\n".join(stale)


def test_no_other_file_holds_the_address():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: which files are the project's is not known")
    allowed = {*TEXTS, "pyproject.toml"}
    for file in set(listed.stdout.splitlines()) - allowed:
        path = ROOT / file
        if path.is_file():
            assert NAME.encode() not in path.read_bytes(), f"{file} is not in moe_edu.lessons.address.FILES"


class TestAnotherAddress:
    def test_nothing_is_left_of_the_old_one(self):
        new = renewed(TEXTS, OTHER)
        assert not [file for file, text in new.items() if NAME in text]
        count = sum(text.count(NAME) for text in TEXTS.values())
        assert sum(text.count(OTHER) for text in new.values()) == count >= 3 * 11

    def test_and_back_again(self):
        assert renewed(renewed(TEXTS, OTHER), NAME) == TEXTS

    def test_stale_lines_are_named(self):
        lines = stale_lines(TEXTS, OTHER)
        place = next(line for line in lines if line.file == FIRST_LESSON)
        text = TEXTS[FIRST_LESSON].splitlines()[place.number - 1]
        assert place.found == text.strip()
        assert OTHER in place.wanted

    @pytest.mark.parametrize(
        "line",
        [
            "https://github.com/{}",
            "[README](https://github.com/{}#readme) says.",
            "see https://github.com/{}.",
            "(https://github.com/{}/blob/main/docs/teaching.md)",
            '"    %pip install -q --no-deps git+https://github.com/{}\\n",',
            'repository-code: "https://github.com/{}"',
            "https://colab.research.google.com/github/{}/blob/main/notebooks/x.ipynb",
            "https://mybinder.org/v2/gh/{}/main?urlpath=lab",
        ],
    )
    def test_every_kind_of_line(self, line):
        assert rewrite(line.format(NAME), OTHER, [NAME]) == line.format(OTHER)

    @pytest.mark.parametrize("line", ["https://github.com/{}_site", "https://github.com/{}-x", "x{}"])
    def test_longer_names_stay(self, line):
        assert rewrite(line.format(NAME), OTHER, [NAME]) == line.format(NAME)

    def test_other_projects_stay(self):
        text = "https://github.com/huggingface/transformers/pull/1"
        assert renewed({**TEXTS, "README.md": text}, OTHER)["README.md"] == text

    def test_a_link_alone_to_another_owner_is_stale(self):
        repository = NAME.split("/")[1]
        assert names_in([f"(https://github.com/someone/{repository}#readme)"], NAME) == {
            f"someone/{repository}"
        }


class TestBadges:
    BADGES = "[![Open in Colab](images/a.svg)](somewhere)\n[![Open in Binder](images/b.svg)](else)\n"

    def test_of_a_notebook_open_it(self):
        file = "notebooks/03_capacity.ipynb"
        text = renewed({file: self.BADGES}, NAME)[file]
        assert re.findall(r"\]\(([^)]*)\)\n", text) == [
            f"https://colab.research.google.com/github/{NAME}/blob/main/{file}",
            f"https://mybinder.org/v2/gh/{NAME}/main?urlpath=lab/tree/{file}",
        ]
        assert "[![Open in Colab](images/a.svg)](" in text

    def test_of_other_files_open_the_first_lesson(self):
        assert (ROOT / FIRST_LESSON).is_file()
        text = renewed({"README.md": self.BADGES}, NAME)["README.md"]
        assert all(f"({badge_link(service, NAME, FIRST_LESSON)})" in text for service in ("Colab", "Binder"))

    def test_every_lesson_has_both(self):
        for file in TEXTS:
            if re.match(r"notebooks/\d\d_", file):
                assert all(badge_link(service, NAME, file) in TEXTS[file] for service in ("Colab", "Binder"))


class TestCommand:
    @pytest.fixture
    def checkout(self, tmp_path):
        for file in (*TEXTS, "pyproject.toml"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
        return tmp_path

    def rename(self, checkout, address):
        path = checkout / "pyproject.toml"
        path.write_text(path.read_text("utf-8").replace(f"https://github.com/{NAME}", address), "utf-8")

    def test_check_names_the_lines_and_changes_nothing(self, checkout):
        self.rename(checkout, f"https://github.com/{OTHER}")
        done = CliRunner().invoke(main, ["--check", "--root", str(checkout)])
        assert done.exit_code == 1
        assert re.search(rf"^{FIRST_LESSON}:\d+: ", done.output, re.M)
        assert "run python -m moe_edu.lessons.address" in done.output
        assert project_texts(checkout) == TEXTS

    def test_rewrites_bytes_and_all(self, checkout):
        self.rename(checkout, f"https://github.com/{OTHER}")
        assert CliRunner().invoke(main, ["--root", str(checkout)]).exit_code == 0
        assert CliRunner().invoke(main, ["--check", "--root", str(checkout)]).exit_code == 0
        (checkout / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
        assert CliRunner().invoke(main, ["--root", str(checkout)]).exit_code == 0
        for file in TEXTS:
            assert (checkout / file).read_bytes() == (ROOT / file).read_bytes()

    @pytest.mark.parametrize(
        "address", ["https://gitlab.com/a/b", "https://github.com/a", "https://github.com/a/b/"]
    )
    def test_an_address_that_the_services_cannot_open(self, checkout, address):
        self.rename(checkout, address)
        done = CliRunner().invoke(main, ["--root", str(checkout)])
        assert done.exit_code == 1
        assert "it must be https://github.com/OWNER/NAME" in done.output

    def test_outside_a_checkout(self, tmp_path):
        done = CliRunner().invoke(main, ["--root", str(tmp_path)])
        assert done.exit_code == 1
        assert "run this in the checkout" in done.output
