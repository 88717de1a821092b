"""Where the lessons are found, and that copying them replaces no file."""

import pytest

from moe_edu.system import notebooks
from moe_edu.system.notebooks import FIRST_LESSON, copy_lessons, find_clone


def test_a_clone_has_its_own_lessons():
    assert find_clone() == notebooks._PACKAGE.parent / "notebooks"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with two lessons and a picture, outside any clone."""
    package = tmp_path / "site-packages" / "moe_edu"
    (package / "notebooks" / "images").mkdir(parents=True)
    for name in (FIRST_LESSON, "01_b.ipynb", "images/a.png"):
        (package / "notebooks" / name).write_text(name)
    monkeypatch.setattr(notebooks, "_PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_copy_replaces_no_file(installed):
    copy = installed / "mine"
    assert find_clone() is None
    assert copy_lessons(copy) == (3, 0)
    (copy / "01_b.ipynb").write_text("my answers")
    (copy / FIRST_LESSON).unlink()
    assert copy_lessons(copy) == (1, 2)
    assert (copy / "01_b.ipynb").read_text() == "my answers"
    assert (copy / "images" / "a.png").is_file()


def test_a_folder_of_other_notebooks_is_no_clone(installed):
    (installed / "notebooks").mkdir()
    (installed / "notebooks" / "mine.ipynb").touch()
    assert find_clone() is None
    (installed / "notebooks" / FIRST_LESSON).touch()
    assert find_clone() == installed / "notebooks"


def test_without_lessons_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "_PACKAGE", tmp_path / "moe_edu")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install moe-edu"):
        copy_lessons(tmp_path / "mine")
