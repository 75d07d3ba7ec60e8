"""What is built and installed is the whole package and nothing else; what the documents point at is there."""

import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest

import sb3_trpo_ext

ROOT = Path(__file__).parent.parent
DOCUMENTS = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"}
SUFFIXES = {".py", ".yml", ".typed", ".sh", ".md", ".gz", ".json", ".png", ".zip"}
"""Of the files that belong to the project in the folders that are packed."""


def sources(*folders: str) -> set[str]:
    """The files of some folders, relative to the root; hidden ones and caches are nobody's."""
    paths = (path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*"))
    hidden = (".", "__pycache__")
    return {
        path.as_posix()
        for path in paths
        if path.suffix in SUFFIXES and not any(part.startswith(hidden) for part in path.parts)
    }


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str, cwd: Path) -> None:
    run("-m", "pip", *arguments, "--no-deps", "--no-index", "--disable-pip-version-check", cwd=cwd)


def only(found: Sequence[Path]) -> Path:
    (path,) = found
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``sdist``, the source distribution, and ``wheel``, the wheel that is made of that alone."""
    folder = tmp_path_factory.mktemp("built")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", str(folder / "sdist"), cwd=ROOT)
    sdist = only(list((folder / "sdist").iterdir()))
    pip("wheel", "--no-build-isolation", "-w", str(folder / "wheel"), str(sdist), cwd=folder)
    return folder


def test_the_source_distribution_has_the_package_its_tests_examples_and_documents(built: Path) -> None:
    sdist = only(list((built / "sdist").iterdir()))
    assert sdist.name == f"sb3_trpo_ext-{sb3_trpo_ext.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == sources("sb3_trpo_ext", "tests", "examples") | DOCUMENTS | {".gitignore", "PKG-INFO"}


def test_the_wheel_has_the_package_with_its_data_and_nothing_else(built: Path) -> None:
    wheel = only(list((built / "wheel").iterdir()))
    assert wheel.name == f"sb3_trpo_ext-{sb3_trpo_ext.__version__}-py3-none-any.whl"
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"sb3_trpo_ext-{sb3_trpo_ext.__version__}.dist-info/METADATA").decode()
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    assert names == sources("sb3_trpo_ext")
    assert {"sb3_trpo_ext/py.typed", "sb3_trpo_ext/zoo/hyperparams/trpo.yml"} <= names
    assert f"\nVersion: {sb3_trpo_ext.__version__}\n" in metadata
    assert metadata.endswith((ROOT / "README.md").read_text())


def test_the_wheel_installs_and_is_imported_from_where_it_was_put(built: Path, tmp_path: Path) -> None:
    pip("install", "--target", str(tmp_path), str(only(list((built / "wheel").iterdir()))), cwd=tmp_path)
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from importlib.metadata import entry_points, version
        from importlib.resources import files
        import sb3_trpo_ext, sb3_trpo_ext.zoo
        (program,) = entry_points(group="console_scripts", name="trpo-zoo")
        assert callable(program.load())
        assert (files(sb3_trpo_ext.zoo) / "hyperparams" / "trpo.yml").is_file()
        model = sb3_trpo_ext.TRPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(64)
        print(sb3_trpo_ext.__file__, sb3_trpo_ext.__version__, version("sb3-trpo-ext"))
    """
    printed = run("-c", "\n".join(line.strip() for line in code.splitlines()), cwd=tmp_path)
    expected = (str(tmp_path / "sb3_trpo_ext" / "__init__.py"), sb3_trpo_ext.__version__, sb3_trpo_ext.__version__)
    assert tuple(printed.split()) == expected


def test_the_version_is_stated_once_and_has_its_changes_listed() -> None:
    assert f"## [{sb3_trpo_ext.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and not re.search(r"^version *=", project, re.MULTILINE)


PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", *sorted(sources("examples"))) if name.endswith(".md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w./:-])(?:[\w.-]+/)+[\w.-]+\.(?:py|md|gz|png|json|yml|sh)\b")
"""A file that is named with its folder, in prose or in a command."""


def anchors(page: Path) -> set[str]:
    """Where links into a document can lead: what its headings become."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_file_names_lead_somewhere(page: Path) -> None:
    text, wrong = page.read_text(), []
    for target in LINK.findall(text):
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        if not target.startswith("https://") and not (there.exists() and (not anchor or anchor in anchors(there))):
            wrong.append(target)
    bases = (page.parent, ROOT, ROOT / "sb3_trpo_ext")
    wrong += [name for name in PATH.findall(text) if not any((base / name).exists() for base in bases)]
    assert not wrong
