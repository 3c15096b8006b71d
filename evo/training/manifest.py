"""What a checkpoint says of itself, sealed by checksums, and the folders that checkpoints are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from evo.files import read_json, sha256, write_text
from evo.training.storage import Entry, Table

FORMAT = 4
_FILE = "checkpoint.json"
_LIMIT = 1 << 28  # bytes; three thousand tensors over 256 ranks need some 40 MB


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not belong to the run that reads it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The facts of a checkpoint that are no tensors.

    Attributes:
        step, skipped, rejected: counts of `TrainState`.
        corpus: fingerprint of the data.
        world: ranks that wrote it.
        config: of the model, as `EvoConfig.to_json`; None for one composed by hand.
        composition: what the model is made of, by the names of its modules.
        files: SHA-256 of every file, by name.
        tensors: where each is.
    """

    step: int
    skipped: int
    rejected: int
    corpus: str
    world: int
    config: Mapping[str, Any] | None
    composition: Mapping[str, str]
    files: Mapping[str, str]
    tensors: Table

    def write(self, folder: Path) -> None:
        """Seal the checkpoint in `folder`: to be done last."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["tensors"] = {name: entry.to_json() for name, entry in self.tensors.items()}
        facts = _canonical({"format": FORMAT, **values})
        write_text(folder / _FILE, f'{{"facts":{facts},"sha256":"{_digest(facts)}"}}\n')

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the checkpoint in `folder`. Raises `CheckpointError` where it is not what was written there."""
        file = folder / _FILE
        try:
            sealed = read_json(file, _LIMIT)
            facts, seal = sealed["facts"], sealed["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error})") from error
        if set(sealed) != {"facts", "sha256"} or _digest(_canonical(facts)) != seal:
            raise CheckpointError(f"{file} is not what was written there")
        if facts["format"] != FORMAT:
            raise FormatError(f"{folder} has format {facts['format']}, this version of evo reads {FORMAT}")
        values = {field.name: facts[field.name] for field in fields(cls)}
        values["tensors"] = {name: Entry.from_json(entry) for name, entry in facts["tensors"].items()}
        return cls(**values)

    def verify(self, folder: Path, rank: int = 0, count: int = 1) -> None:
        """Compare the files with their checksums; of `count` ranks that share the work `rank` has every `count`-th.

        Raises `CheckpointError` for the first that is missing or not what was written there.
        """
        for name, digest in sorted(self.files.items())[rank::count]:
            try:
                found = sha256(folder / name)
            except OSError as error:
                raise CheckpointError(f"{folder / name} cannot be read ({error})") from error
            if found != digest:
                raise CheckpointError(f"{folder / name} is not what was written there")


class FormatError(CheckpointError):
    """A whole checkpoint of another version."""


def place(folder: Path, step: int) -> Path:
    """Where in `folder` the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*"))


def remove(path: Path) -> None:
    """Delete a checkpoint under a hidden name, so that a kill half-way leaves nothing that looks like one."""
    if path.exists():
        hidden = path.with_name(f".{path.name}-old")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Delete what a kill left under hidden names."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def _canonical(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
