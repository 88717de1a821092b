"""One line says what is missing or too old and how to fix it; on Colab and Kaggle, it names their menus."""

import re
from importlib.metadata import PackageNotFoundError

import pytest

from moe_edu import lessons
from moe_edu.lessons.service import COLAB, KAGGLE, advise, find_service
from moe_edu.system import requirements
from moe_edu.system.requirements import (
    Lack,
    MissingRequirementError,
    describe_missing,
    explain_missing,
    find_lacks,
    require_all,
    requirements_of,
)


def installed(**versions):
    """A stand-in for importlib.metadata.version."""

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    return version


class TestLacks:
    @pytest.mark.parametrize("found", ["2.10", "2.10.0+cu128", "2.13.0", "3.0.dev1", "2.10.0a0+git1"])
    def test_new_enough(self, found):
        assert find_lacks(["torch>=2.10"], installed(torch=found)) == []

    @pytest.mark.parametrize("found", ["2.9.0+cpu", "2.9.1", "1.13"])
    def test_too_old(self, found):
        assert find_lacks(["torch>=2.10"], installed(torch=found)) == [Lack("torch", "2.10", found)]

    def test_missing(self):
        lacks = find_lacks(["torch>=2.10", "tqdm>=4.66"], installed(torch="2.10"))
        assert lacks == [Lack("tqdm", "4.66", None)]

    def test_ours_are_met_in_this_environment(self):
        assert "torch>=2.10" in requirements_of()
        assert find_lacks(requirements_of() + requirements_of("lessons")) == []

    def test_an_extra_lists_what_it_adds(self):
        assert not [text for text in requirements_of() if re.match("plotly|papermill|moe-edu", text)]
        assert "plotly>=5.24" in requirements_of("lessons")
        assert "torch>=2.10" not in requirements_of("lessons")

    def test_an_extra_of_extras(self):
        assert {*requirements_of("lessons"), "papermill>=2.6"} <= {*requirements_of("lab")}

    def test_a_package_that_is_not_installed_requires_nothing(self):
        assert requirements_of(package="no-such-package-of-ours") == []


class TestMissing:
    def test_the_error_names_the_command_that_fixes_it(self, monkeypatch):
        lacks = [
            [Lack("sacrebleu", "2.5", None), Lack("torch", "2.10", "2.9")],
            [Lack("anywidget", "0.9", None)],
        ]
        monkeypatch.setattr(requirements, "find_lacks", lambda _: lacks.pop(0))
        with pytest.raises(MissingRequirementError, match="Run %pip install sacrebleu anywidget in a cell"):
            require_all()

    def test_notebooks_show_one_line(self):
        error = MissingRequirementError(describe_missing(["tqdm"]))
        (line,) = error._render_traceback_()
        assert line.startswith("MissingRequirementError: not installed: tqdm. Run %pip install tqdm")
        assert "\n" not in line

    def test_passes_here(self):
        require_all()
        assert explain_missing("jupyterlab") is None

    def test_the_command_line_names_the_extra(self, monkeypatch):
        monkeypatch.setattr(
            requirements, "find_missing", lambda extra: ["plotly"] if extra == "lessons" else []
        )
        expected = 'not installed: plotly, no_such_module. Run `pip install "moe-edu[lab]"`'
        assert explain_missing("no_such_module", "json") == expected


class TestService:
    def test_none_at_home(self):
        assert find_service({}) is None

    def test_by_the_variable_that_each_sets(self):
        assert find_service({"COLAB_RELEASE_TAG": "release-colab_x"}) is COLAB
        assert find_service({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}) is KAGGLE

    def test_kaggle_also_looks_like_colab(self):
        assert find_service({"COLAB_RELEASE_TAG": "x", "KAGGLE_KERNEL_RUN_TYPE": "Interactive"}) is KAGGLE


class TestAdvice:
    def test_nothing_to_say(self):
        assert advise(None, [], has_gpu=False) == []
        assert advise(COLAB, [], has_gpu=True) == []

    @pytest.mark.parametrize("service", [COLAB, KAGGLE])
    def test_without_a_gpu(self, service):
        (line,) = advise(service, [], has_gpu=False)
        assert service.gpu_menu in line

    @pytest.mark.parametrize("service", [None, COLAB, KAGGLE])
    def test_a_pytorch_that_is_too_old_is_not_replaced_by_pip(self, service):
        (line,) = advise(service, [Lack("torch", "2.10", "2.9.0")], has_gpu=True)
        assert line.startswith("torch 2.9.0 is too old, 2.10 or newer is needed: ")
        assert "pip" not in line
        assert service is None or service.version_menu in line

    def test_others_are(self):
        (line,) = advise(None, [Lack("plotly", "5.24", "5.0")], has_gpu=True)
        assert "%pip install -U plotly" in line

    def test_is_printed_when_a_lesson_begins(self, monkeypatch, capsys):
        monkeypatch.setattr("moe_edu.lessons.notebook.display", lambda bundle, raw: None)
        monkeypatch.setattr("moe_edu.lessons.notebook.find_lacks", lambda _: [Lack("torch", "2.10", "2.9.0")])
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
        lessons.begin()
        too_old, no_gpu = capsys.readouterr().out.splitlines()
        assert KAGGLE.version_menu in too_old
        assert KAGGLE.gpu_menu in no_gpu

    def test_nothing_is_printed_at_home(self, monkeypatch, capsys):
        monkeypatch.setattr("moe_edu.lessons.notebook.display", lambda bundle, raw: None)
        for variable in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
            monkeypatch.delenv(variable, raising=False)
        lessons.begin()
        assert capsys.readouterr().out == ""
