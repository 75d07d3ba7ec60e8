import ast
import sys
from pathlib import Path

import pytest

import sb3_trpo_ext

ROOT = Path(sb3_trpo_ext.__file__).parent
ALGORITHMS = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}


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


@pytest.mark.parametrize("path", sorted((ROOT / "core").glob("*.py")), ids=lambda path: path.name)
def test_core_knows_only_torch_and_the_standard_library(path: Path) -> None:
    names = imports(path)
    assert inside(names) <= {"core"}
    others = {name.split(".")[0] for name in names} - {"torch", "sb3_trpo_ext"}
    assert others <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sorted((ROOT / "sb3").glob("*.py")), ids=lambda path: path.name)
def test_the_sb3_layer_knows_no_algorithm(path: Path) -> None:
    assert inside(imports(path)) <= {"core", "sb3"}


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_algorithms_know_the_layers_below_and_each_others_public_classes(name: str) -> None:
    path = ROOT / f"{name}.py"
    assert inside(imports(path)) <= {"core", "sb3"} | ALGORITHMS - {name}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").removeprefix("sb3_trpo_ext.") in ALGORITHMS:
            assert {alias.name for alias in node.names} <= set(sb3_trpo_ext.__all__)


@pytest.mark.parametrize("path", sorted((ROOT / "zoo").glob("*.py")), ids=lambda path: path.name)
def test_the_zoo_knows_what_users_know(path: Path) -> None:
    assert inside(imports(path)) <= {"", "zoo"}


def test_nobody_knows_the_zoo() -> None:
    for path in ROOT.rglob("*.py"):
        assert path.parent == ROOT / "zoo" or "zoo" not in inside(imports(path))
