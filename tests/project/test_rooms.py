"""Imports go one way: each room imports from rooms below it, and no two modules import each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "moe_edu"
# From the ground up. Rooms on one floor do not know each other.
FLOORS = (
    "kernels config system data",
    "moe",
    "model figures",
    "training analysis exercises",
    "experiments lessons",
    "explorers",
    "bench",
    "__init__",
    "environment",
    "cli",
    "__main__",
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}


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
            # What a package's own file defines is one of its public names.
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


def test_every_module_is_in_a_room():
    assert {room_of(module) for module in MODULES} <= FLOOR.keys()
