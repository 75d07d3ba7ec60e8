"""What is built from a checkout: a wheel of the package alone, and a source distribution with all that its tests need."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sb3_trpo_ext

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "sb3_trpo_ext").rglob("*.py")}
    assert package <= set(names)
    assert "sb3_trpo_ext/py.typed" in names and "sb3_trpo_ext/zoo/hyperparams/trpo.yml" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sb3_trpo_ext"}


def test_the_wheel_is_imported_where_it_is_installed(built: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(next(built.glob("*.whl")))], check=True)
    code = (
        "import importlib.metadata, sb3_trpo_ext;"
        "print(sb3_trpo_ext.__file__, sb3_trpo_ext.__version__, importlib.metadata.version('sb3-trpo-ext'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )
    place, *versions = run.stdout.split()
    assert Path(place).is_relative_to(tmp_path)
    assert versions == [sb3_trpo_ext.__version__] * 2


def test_the_source_distribution_has_tests_and_examples_whole(built: Path) -> None:
    names = {name.split("/", 1)[1] for name in tarfile.open(next(built.glob("*.tar.gz"))).getnames()}
    for folder in ("sb3_trpo_ext", "tests", "examples"):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")} <= names
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "data").iterdir()} <= names


def test_the_changelog_knows_the_version() -> None:
    assert f"## [{sb3_trpo_ext.__version__}] - 20" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "examples").rglob("*.md")), ids=lambda p: p.name
)
def test_what_is_linked_is_there(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target
