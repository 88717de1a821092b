"""Every notebook as readers first open it: in an environment like Colab's and an empty folder, without our checkout.

The environment has Colab's packages, in Colab's versions, and a link to the PyTorch that is installed here; the
notebooks' own first cell installs the rest. Its `git+https://...` is served from a copy of this checkout, including
uncommitted changes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

from moe_edu.lessons.address import read_name
from moe_edu.lessons.service import COLAB, KAGGLE
from moe_edu.system.requirements import describe_missing

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info >= (3, 13),
    reason="Colab runs Linux and Python 3.12; not all of its packages are built for other systems",
)

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRAINING = ("07", "09")  # lessons that train for minutes: here a few steps show that they run
# By day the lessons with figures, with a training run, and without transformers, which is not there; by night, all.
DAILY = ("03", "07", "10")

# Colab's runtime 2026.01, except PyTorch: pip-freeze.txt of github.com/googlecolab/backend-info at bd8aaa45.
OF_COLAB = {
    "ipykernel": "6.17.1",  # the kernel itself, with old packages that newer kernels do not need
    "ipython": "7.34.0",
    "jupyter_client": "7.4.9",
    "pyzmq": "26.2.1",
    "tornado": "6.5.1",
    "traitlets": "5.7.1",
    "backcall": "0.2.0",
    "decorator": "4.4.2",
    "ipython-genutils": "0.2.0",
    "nest-asyncio": "1.6.0",
    "pickleshare": "0.7.5",
    "widgetsnbextension": "3.6.10",
    "ipywidgets": "7.7.1",  # from here on: what the package needs, except anywidget and sacrebleu
    "plotly": "5.24.1",
    "numpy": "2.0.2",
    "tokenizers": "0.22.2",
    "safetensors": "0.7.0",
    "tqdm": "4.67.1",
    "click": "8.3.1",
}
# Further packages that these need, and PyTorch: linked, not installed.
LINKED = (
    *(
        "torch",
        "pip",
        "debugpy",
        "entrypoints",
        "huggingface-hub",
        "jedi",
        "jupyter-core",
        "jupyterlab-widgets",
    ),
    *("matplotlib-inline", "packaging", "pexpect", "prompt-toolkit", "psutil", "pygments", "python-dateutil"),
    "tenacity",
)
NO_REGISTRY = re.compile(
    r"\(from versions: none\)|ConnectionError|ConnectTimeout|ReadTimeout|name resolution|unreachable"
)


class Place:
    """A Python environment, an empty folder, and how to run notebooks there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "env" / "bin" / "python"
        self.empty = folder / "empty"
        self.empty.mkdir()
        self.environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "VIRTUAL_ENV", "MOE_EDU", "JUPYTER", "COLAB", "KAGGLE"))
        } | {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONNOUSERSITE": "1",
            "IPYTHONDIR": str(folder / "ipython"),
            "MOE_EDU_PROGRESS": str(folder / "progress.json"),
            "OMP_NUM_THREADS": "1",
        }

    def pip(self, *arguments: str) -> str:
        command = [self.python, "-m", "pip", *arguments]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True)
        if done.returncode:
            if NO_REGISTRY.search(done.stderr) and not os.environ.get("CI"):
                pytest.skip(f"packages cannot be had here: {done.stderr.splitlines()[-1]}")
            raise RuntimeError(done.stderr)
        return done.stdout

    def packages(self) -> dict[str, str]:
        """Versions by name."""
        return {
            item["name"].lower(): item["version"] for item in json.loads(self.pip("list", "--format=json"))
        }

    def torch_files(self) -> dict[str, tuple[int, int]]:
        """Size and modification time of every file of PyTorch except compiled Python."""
        links = self.folder / "env" / "links"
        folders = [links / "torch", *links.glob("torch-*.dist-info")]
        return {
            str(path): (path.stat().st_size, path.stat().st_mtime_ns)
            for folder in folders
            for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }

    def run(self, notebook: nbformat.NotebookNode, **environ: str) -> nbformat.NotebookNode:
        """Run every cell in the empty folder, continuing after errors."""
        client = NotebookClient(
            notebook,
            km=_KernelOf(self.python),
            timeout=300,
            allow_errors=True,
            store_widget_state=False,
            resources={"metadata": {"path": str(self.empty)}},
        )
        try:
            return client.execute(env=self.environ | environ)
        finally:
            run_sync(client.km.shutdown_kernel)(
                now=True
            )  # the client leaves a manager that it was given alone


class _KernelOf(AsyncKernelManager):
    """Starts IPython kernels of another environment."""

    def __init__(self, python: Path) -> None:
        super().__init__()
        argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        self._kernel_spec = KernelSpec(argv=argv, display_name="clean", language="python")


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook as it ships, except for the number of training steps."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if path.name[:2] in TRAINING and "parameters" in cell.metadata.get("tags", []):
            cell.source += "\nfast, steps = True, 12"
    return notebook


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def first_cell_only() -> nbformat.NotebookNode:
    notebook = read(NOTEBOOKS[0])
    notebook.cells = code(notebook)[:1]
    return notebook


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def errors(notebook: nbformat.NotebookNode) -> list[str]:
    """The errors, each with its cell's name."""
    return [
        f"{cell.id}: {output.get('evalue', output.get('text'))}"
        for cell in code(notebook)
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def commit(folder: Path) -> None:
    """Make a git repository of the files in `folder`."""
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "as it is"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory, make_environment):
    """The place before any notebook has run, with its contents at that time."""
    place = Place(tmp_path_factory.mktemp("clean"))
    make_environment(place.folder / "env", LINKED)
    pins = (f"{name}=={pin}" for name, pin in OF_COLAB.items())
    place.pip("install", "-q", "--no-compile", "--no-deps", *pins)
    (site,) = (place.folder / "env" / "lib").glob("python*/site-packages")
    # An empty package named like the server that widgetsnbextension requires: the kernel does not need that server,
    # which would bring 60 packages.
    (site / "notebook-6.5.7.dist-info").mkdir()
    (site / "notebook-6.5.7.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: notebook\nVersion: 6.5.7\n", "utf-8"
    )
    # Colab's own module, of which `lessons.begin` calls one function.
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "output.py").write_text(
        "def enable_custom_widget_manager():\n    print('custom widgets are enabled')\n", "utf-8"
    )
    return place, place.packages(), place.torch_files()


@pytest.fixture(scope="module")
def installed(bare, copy_checkout):
    """The place after running the first lesson as on Colab, and that lesson."""
    place, *_ = bare
    source = place.folder / "source"
    copy_checkout(source)
    commit(source)
    name = read_name((ROOT / "pyproject.toml").read_text("utf-8"))
    lesson = place.run(
        read(NOTEBOOKS[0]),
        COLAB_RELEASE_TAG="test",
        CUDA_VISIBLE_DEVICES="",
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0=f"url.{source.as_uri()}.insteadOf",
        GIT_CONFIG_VALUE_0=f"https://github.com/{name}",
    )
    shutil.rmtree(source)  # from here on there is no repository
    return place, lesson


class TestFirstLesson:
    def test_runs_without_an_error(self, installed):
        assert errors(installed[1]) == []

    def test_shows_its_widgets_and_says_where_to_find_a_gpu(self, installed):
        said = printed(code(installed[1])[0])
        assert "custom widgets are enabled" in said
        assert f"No GPU here, and no lesson needs one. To get one: {COLAB.gpu_menu}" in said
        views = [
            output for cell in code(installed[1]) for output in cell.outputs if "widget-view" in str(output)
        ]
        assert len(views) >= 2

    def test_leaves_nothing_in_the_readers_folder(self, installed):
        assert list(installed[0].empty.iterdir()) == []


class TestInstallation:
    def test_touches_nothing_that_was_there(self, bare, installed):
        place, before, torch_files = bare
        after = place.packages()
        assert {name: after.get(name) for name in before} == before
        assert place.torch_files() == torch_files
        assert len(torch_files) > 1000

    def test_brings_the_package_and_little_else(self, bare, installed):
        place, before, _ = bare
        brought = set(place.packages()) - set(before)
        assert {"moe-edu", "sacrebleu", "anywidget"} <= brought
        assert len(brought) < 12
        assert not [name for name in brought if re.match("torch|nvidia|triton", name)]


OFFLINE = {"PIP_NO_INDEX": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.name.startswith(DAILY) else pytest.mark.nightly)
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_every_notebook_runs_offline_afterwards(installed, path):
    place, _ = installed
    notebook = place.run(read(path), **OFFLINE)
    assert errors(notebook) == []
    assert not [cell for cell in code(notebook)[:1] if printed(cell)]  # no pip, and nothing to report


def test_kaggles_readers_hear_of_its_own_menu(installed):
    place, _ = installed
    notebook = place.run(
        first_cell_only(), **OFFLINE, KAGGLE_KERNEL_RUN_TYPE="Interactive", CUDA_VISIBLE_DEVICES=""
    )
    (line,) = printed(notebook.cells[0]).splitlines()
    assert line.startswith("No GPU here")
    assert KAGGLE.gpu_menu in line


@pytest.mark.parametrize("name", ["sacrebleu", "anywidget", "plotly"])
def test_a_missing_package_is_named_in_one_line(installed, name):
    place, _ = installed
    (site,) = (place.folder / "env" / "lib").glob("python*/site-packages")
    away = place.folder / "away"
    away.mkdir()
    parts = [site / name, *site.glob(f"{name}-*.dist-info")]
    assert len(parts) == 2
    for part in parts:
        part.rename(away / part.name)
    try:
        notebook = place.run(first_cell_only(), **OFFLINE)
    finally:
        for part in parts:
            (away / part.name).rename(part)
        away.rmdir()
    (output,) = notebook.cells[0].outputs
    assert output.traceback == [f"MissingRequirementError: {describe_missing([name])}"]
