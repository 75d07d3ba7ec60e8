"""Sharing on the Hugging Face hub by the RL Zoo's own programs, where their current releases need help.

rl_zoo3 2.9 and the packages that it asks for disagree about a name and about an error; that is put right here, while
one of the zoo's programs runs. The model card that the zoo writes is told which commands know the algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import huggingface_hub.repocard
import huggingface_sb3
import requests
from huggingface_hub.errors import EntryNotFoundError


@contextmanager
def working_hub() -> Iterator[None]:
    """While it is open, the zoo's upload and download work with the installed packages of Hugging Face."""
    download, save = huggingface_sb3.load_from_hub, huggingface_hub.repocard.metadata_save
    push: Any = import_module("huggingface_sb3.push_to_hub")  # the package has a function of that name

    def load_from_hub(repo_id: str, filename: str) -> str:
        """The zoo takes a missing file as a `requests.HTTPError`, which the hub no longer raises."""
        try:
            return str(download(repo_id, filename))
        except EntryNotFoundError as error:
            raise requests.exceptions.HTTPError(str(error)) from error

    def generate_metadata(*args: Any) -> dict[str, Any]:
        """Its name and type before sb3-team-hf-integration 3.1."""
        return dict(push._generate_metadata(*args).to_dict())

    def metadata_save(path: str | Path, data: dict[str, Any]) -> None:
        """Save the metadata of a model card, and let its commands be ours."""
        card = Path(path)
        card.write_text(our_commands(card.read_text(encoding="utf-8")), encoding="utf-8")
        save(path, data)

    with (
        patch.object(huggingface_sb3, "load_from_hub", load_from_hub),
        patch.object(huggingface_hub.repocard, "metadata_save", metadata_save),
        patch.object(push, "generate_metadata", getattr(push, "generate_metadata", generate_metadata), create=True),
    ):
        yield


def our_commands(card: str) -> str:
    """The text of a model card of the zoo with the commands that know our algorithms."""
    return card.replace("python -m rl_zoo3.", "python -m sb3_trpo_ext.zoo ").replace(
        "pip install rl_zoo3", 'pip install "sb3-trpo-ext[zoo]"'
    )
