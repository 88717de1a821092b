"""The glossary's names exist: ours in the package, Hugging Face's in the release that it names."""

import inspect
import re
from pathlib import Path

import nbformat
import pytest
from transformers.models.nllb_moe import configuration_nllb_moe, modeling_nllb_moe

import moe_edu
from moe_edu import config, data
from moe_edu.analysis import specialisation, traffic
from moe_edu.model import layers
from moe_edu.model.translator import MoETranslator
from moe_edu.moe import dispatch, experts, layer, loops, losses, metrics, router_losses, routing

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
GLOSSARY = nbformat.read(NOTEBOOKS / "glossary.ipynb", as_version=4)
WRITTEN = "\n\n".join(cell.source for cell in GLOSSARY.cells)
# The longest names are written in HTML, with places where a line may break.
TEXT = re.sub(r"<code>(\w+)<wbr>(\w+)</code>", r"`\1\2`", WRITTEN)
COLUMNS = ("term", "what", "ours", "elsewhere", "lesson")
OURS_ALONE = ("term", "what", "ours", "lesson")  # columns that the other libraries do not have


def terms():
    """One dictionary per row of the tables of terms."""
    rows = [line.strip("|").split(" | ") for line in TEXT.splitlines() if line.startswith('| <a id="')]
    return [
        dict(zip(COLUMNS if len(row) == 5 else OURS_ALONE, (cell.strip() for cell in row), strict=True))
        for row in rows
    ]


def names(column):
    return sorted({name for row in terms() for name in re.findall(r"`([^`]+)`", row[column])})


def names_elsewhere(library):
    written = [row["elsewhere"] for row in terms() if "elsewhere" in row]
    lines = [line for names in written for line in names.split("<br>") if line.startswith(f"{library}: ")]
    return sorted({name for line in lines for name in re.findall(r"`([^`]+)`", line)})


MODULES = (
    moe_edu,
    config,
    data,
    dispatch,
    experts,
    layer,
    layers,
    loops,
    losses,
    metrics,
    router_losses,
    routing,
    specialisation,
    traffic,
)
CLASSES = (config.MoEConfig, metrics.ExpertMetrics, routing.RouterOutput, MoETranslator)
ARGUMENTS = {
    name
    for function in (losses.moe_loss, routing.top2_gating, layer.SparseMLP.forward)
    for name in inspect.signature(function).parameters
}


def test_contains_prose_only():
    assert {cell.cell_type for cell in GLOSSARY.cells} == {"markdown"}
    assert len(terms()) >= 45


@pytest.mark.parametrize("name", names("ours"))
def test_our_names_exist(name):
    owner, _, attribute = name.rpartition(".")
    if owner:
        assert owner == "RouterOutput"
        assert attribute in routing.RouterOutput.__dataclass_fields__ or hasattr(
            routing.RouterOutput, attribute
        )
    else:
        assert name in ARGUMENTS or any(hasattr(place, name) for place in (*MODULES, *CLASSES))


@pytest.mark.parametrize("name", names_elsewhere("Hugging Face"))
def test_names_of_hugging_face_exist(name):
    source = inspect.getsource(modeling_nllb_moe) + inspect.getsource(configuration_nllb_moe)
    assert re.search(rf"\b{name}\b", source)


def test_names_three_libraries_beside_ours():
    assert all(len(names_elsewhere(library)) >= 15 for library in ("Hugging Face", "fairseq", "Google"))


def test_letters_are_those_of_the_package():
    letters = re.findall(r"^\| \$(\w)\$ \|", TEXT, flags=re.MULTILINE)
    assert letters == list("BSTDFEKCVL")


def test_sizes_are_those_of_the_published_model():
    """They agree with tests/model/test_budget.py, which checks them against the published number of parameters."""
    sizes = dict(re.findall(r"^\| \$(\w)\$ \| [^|]+ \| ([\d,]+) \|", TEXT, flags=re.MULTILINE))
    sizes = {letter: size.replace(",", "") for letter, size in sizes.items()}
    budget = (Path(__file__).parents[1] / "model" / "test_budget.py").read_text("utf-8")
    for letter, field in {
        "V": "vocab_size",
        "D": "d_model",
        "F": "encoder_ffn_dim",
        "L": "encoder_layers",
    }.items():
        assert f"{field}={sizes[letter]}," in budget
    assert int(sizes["E"]) == config.MoEConfig.num_experts


def test_anchors_are_unique_and_all_links_to_them_lead_there():
    anchors = re.findall(r'<a id="([^"]+)"></a>', TEXT)
    headings = [title.replace(" ", "-") for title in re.findall(r"^##? (.+)$", TEXT, flags=re.MULTILINE)]
    assert len(set(anchors)) == len(anchors)
    for path in NOTEBOOKS.glob("*.ipynb"):
        for target in re.findall(r"glossary\.ipynb#([\w+-]+)", path.read_text("utf-8")):
            assert target in anchors + headings, (path.name, target)


def test_every_term_names_a_lesson():
    for row in terms():
        number, file = re.fullmatch(r"\[(\d+)\]\((\d\d_\w+\.ipynb)\)", row["lesson"]).groups()
        assert file.startswith(f"{int(number):02}_")
        assert row["what"].endswith(".")
        assert len(row["what"].split()) <= 20
