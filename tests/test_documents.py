"""What the documents point at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w./:-])(?:[\w.-]+/)+[\w.-]+\.(?:py|md|gz|png|json|yml|sh)\b")
"""A file that is named with its folder, in prose or in a command."""


def anchors(document: Path) -> set[str]:
    """Where links into a document can lead: what its headings become."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_file_names_lead_somewhere(document: Path) -> None:
    text, wrong = document.read_text(), []
    for target in LINK.findall(text):
        name, _, anchor = target.partition("#")
        there = document.parent / name if name else document
        if not target.startswith("https://") and not (there.exists() and (not anchor or anchor in anchors(there))):
            wrong.append(target)
    bases = (document.parent, ROOT, ROOT / "sb3_trpo_ext")
    wrong += [name for name in PATH.findall(text) if not any((base / name).exists() for base in bases)]
    assert not wrong
