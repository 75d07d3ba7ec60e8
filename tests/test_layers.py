"""Who may import whom: core <- rollout <- policy <- critic <- training <- methods <- zoo, never the other way."""

import ast
import sys
from pathlib import Path

import pytest

import sb3_trpo_ext

ROOT = Path(sb3_trpo_ext.__file__).parent
ROOMS = ["core", "rollout", "policy", "critic", "training"]
METHODS = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def inside(names: set[str]) -> set[str]:
    """What of our own package is imported, as its first name below the root ("" for the root itself)."""
    ours = [name.split(".") for name in names if name.split(".")[0] == "sb3_trpo_ext"]
    return {parts[1] if len(parts) > 1 else "" for parts in ours}


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).glob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_no_other_room() -> None:
    folders = {path.name for path in ROOT.iterdir() if any(path.glob("*.py"))}
    assert folders == {*ROOMS, "zoo"}


@pytest.mark.parametrize("path", [path for room in ROOMS for path in files(room)], ids=name_of)
def test_a_room_knows_those_below(path: Path) -> None:
    assert inside(imports(path)) <= {*ROOMS[: ROOMS.index(path.parent.name) + 1]}


@pytest.mark.parametrize("path", files("core"), ids=name_of)
def test_core_knows_only_torch_and_the_standard_library(path: Path) -> None:
    others = {name.split(".")[0] for name in imports(path)} - {"torch", "sb3_trpo_ext"}
    assert others <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_know_the_rooms_and_each_others_public_classes(name: str) -> None:
    path = ROOT / f"{name}.py"
    assert inside(imports(path)) <= {*ROOMS} | METHODS - {name}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").removeprefix("sb3_trpo_ext.") in METHODS:
            assert {alias.name for alias in node.names} <= set(sb3_trpo_ext.__all__)


@pytest.mark.parametrize("path", files("zoo"), ids=name_of)
def test_the_zoo_knows_what_users_know(path: Path) -> None:
    assert inside(imports(path)) <= {"", "zoo"}
