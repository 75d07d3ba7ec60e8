"""Checkpoints on disk: written so that a kill at any moment leaves a whole one, and read with care.

A directory of checkpoints holds ``000000012288/`` for the state after 12 288 timesteps: a file of each rank, and a
``manifest.json`` which is written last, once they are there, and says what they hash to. Without it there is none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
KEPT = 2
"""Checkpoints that are kept: the last, and the one before it should that be damaged."""

SECONDS_TO_APPEAR = 5.0
"""For a file that another machine has written."""

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"


class DamagedError(Exception):
    """A checkpoint that is not as it was written; the message says what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        path: Its folder.
        manifest: What its manifest says of it.
        part: What this rank wrote, or rank 0 where the run had fewer.
        own: Whether this rank wrote it.
    """

    path: Path
    manifest: dict[str, Any]
    part: bytes
    own: bool = True


class CheckpointFolder:
    """The directory of a run's checkpoints.

    Args:
        path: The directory, made if it is not there.
        rank: Of this process, among those that train together.
        world_size: How many those are.
    """

    def __init__(self, path: str | os.PathLike[str], rank: int = 0, world_size: int = 1) -> None:
        self.path = Path(path).absolute()  # also where the program changes into another directory
        self._rank, self._world_size = rank, world_size
        said = f"`checkpoint_dir` must be a directory that can be written, got {str(path)!r}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{said}: {error}") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(said)

    def leave_mark(self) -> str:
        """Write a file by which others see that they share the directory; its name."""
        name = f".shared-{os.urandom(8).hex()}"
        (self.path / name).touch()
        return name

    def has(self, mark: str) -> bool:
        """Whether such a file is there, or comes over the network within some seconds."""
        end = time.monotonic() + SECONDS_TO_APPEAR
        while not (self.path / mark).exists():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def remove_mark(self, mark: str) -> None:
        """Remove such a file, if nobody has."""
        with suppress(OSError):
            _unlink(self.path / mark)

    def write_part(self, steps: int, part: bytes) -> dict[str, Any]:
        """Write what a rank has to keep; what the manifest is to say of it."""
        folder = self._folder(steps)
        folder.mkdir(parents=True, exist_ok=True)
        _unlink(folder / MANIFEST)  # of a checkpoint that is written anew
        name = _name_of_part(self._rank)
        _write(folder / name, part)
        return {"name": name, "bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()}

    def write_manifest(self, steps: int, parts: list[dict[str, Any]], said: Mapping[str, Any]) -> Path:
        """Make a checkpoint of the parts of all ranks, and drop those before the last; for rank 0."""
        folder = self._folder(steps)
        manifest = {"format": FORMAT, "steps": steps, "world_size": self._world_size, "parts": parts, **said}
        _write(folder / MANIFEST, json.dumps({"sha256": _hash(manifest), **manifest}, indent=1).encode())
        _sync_folder(self.path)
        complete = [each for each in self._folders() if (each / MANIFEST).exists()]
        later = [each for each in complete if int(each.name) > steps]  # damaged, as this run went on from before them
        kept = {*later, *complete[len(later) :][:KEPT]}
        for each in [each for each in self._folders() if each not in kept]:
            _remove(each)
        return folder

    def discard(self, steps: int) -> None:
        """Drop the parts of a checkpoint that could not be completed, which a full disk has no room for; for rank 0."""
        with suppress(OSError):
            _remove(self._folder(steps))

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None where there is none.

        Raises:
            DamagedError: If there are some, and none is whole.
        """
        problems: list[str] = []
        for folder in self._folders():
            if not (folder / MANIFEST).exists():
                continue  # it was being written, or removed
            try:
                found = self._read(folder)
            except (DamagedError, OSError) as error:
                problems.append(f"{folder}: {error}")
                continue
            for problem in problems:
                warnings.warn(
                    f"A checkpoint is damaged, and the one before it, {folder}, is used. {problem}", stacklevel=4
                )
            return found
        if problems:
            raise DamagedError(
                f"No checkpoint in {self.path} is whole, and nothing was loaded. "
                + "; ".join(problems)
                + ". Start with an empty `checkpoint_dir`, or bring back a copy of these files."
            )
        return None

    def _read(self, folder: Path) -> Checkpoint:
        manifest = read_manifest(folder / MANIFEST)
        parts: dict[str, bytes] = {}
        for each in manifest["parts"]:
            path = folder / each["name"]
            if not path.is_file():
                raise DamagedError(f"{each['name']} is missing")
            data = path.read_bytes()
            if len(data) != each["bytes"]:
                raise DamagedError(f"{each['name']} has {len(data)} bytes in place of {each['bytes']}")
            if hashlib.sha256(data).hexdigest() != each["sha256"]:
                raise DamagedError(f"{each['name']} is not what was written: its SHA-256 is another")
            parts[each["name"]] = data
        own = _name_of_part(self._rank)
        if _name_of_part(0) not in parts:
            raise DamagedError(f"{_name_of_part(0)} is missing")
        return Checkpoint(folder, manifest, parts.get(own, parts[_name_of_part(0)]), own in parts)

    def _folder(self, steps: int) -> Path:
        return self.path / f"{steps:012d}"

    def _folders(self) -> Iterator[Path]:
        """Those of checkpoints, the newest first."""
        names = (each for each in self.path.iterdir() if re.fullmatch(r"\d{12,}", each.name) and each.is_dir())
        yield from sorted(names, key=lambda each: int(each.name), reverse=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint: first its manifest, as what is half removed is none, and nothing that is not of it."""
    _unlink(folder / MANIFEST)
    for path in (*folder.glob(f"*{UNFINISHED}"), *folder.glob(_name_of_part("*"))):
        _unlink(path)
    with suppress(OSError):
        folder.rmdir()


def read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest says.

    Raises:
        DamagedError: If it is not what was written.
    """
    try:
        manifest = json.loads(path.read_bytes())
        said = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{path.name} cannot be read ({error})") from error
    if said != _hash(manifest):
        raise DamagedError(f"{path.name} is not what was written: its SHA-256 is another")
    if manifest["format"] != FORMAT:
        raise DamagedError(f"{path.name} is of format {manifest['format']}, and this release reads {FORMAT}")
    return dict(manifest)


def _name_of_part(rank: int | str) -> str:
    return f"rank-{rank}.pkl"


def _hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write a file as a whole: under another name, to the disk, and only then under its own."""
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        _unlink(unfinished)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Bring a directory's entries to the disk, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
