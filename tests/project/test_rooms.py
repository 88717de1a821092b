"""The map in CONTRIBUTING.md is true: imports go one way, from each room to rooms on lower floors, without a circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moe_edu"
# (floor, room, what it holds) of each row of the map. Rooms on one floor do not know each other.
MAP = re.findall(
    r"^\| (\d+) \| `(\w+)(?:\.py)?` \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M
)
FLOOR = {room: int(floor) for floor, room, _ in MAP}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name if path.parent == PACKAGE else name.removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """The package's modules that a file imports anywhere: in functions and for type checking, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            # Names defined in a package's `__init__.py` are its public names.
            found |= modules if modules <= MODULES.keys() else modules | {node.module}
    return {"moe_edu.__init__" if name == "moe_edu" else name for name in found} & MODULES.keys()


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_imports_from_lower_floors_alone(room):
    inside = [module for module in MODULES if room_of(module) == room]
    assert inside
    for module in inside:
        for other in map(room_of, imports_of(MODULES[module])):
            allowed = other == room or FLOOR[other] < FLOOR[room]
            assert allowed, f"{module} imports from {other}"


def test_no_circle():
    graph = {module: imports_of(path) - {module} for module, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())


def test_every_module_is_in_a_room_that_the_map_has_once():
    assert sorted(room for _, room, _ in MAP) == sorted({room_of(module) for module in MODULES})


def test_files_that_the_map_names_exist():
    for _, room, holds in MAP:
        for name in re.findall(r"`(\w+\.py)`", holds):
            assert (PACKAGE / room / name).is_file(), f"{room}/{name}"
