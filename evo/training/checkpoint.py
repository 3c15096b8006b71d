"""Checkpoints that are written whole or not at all, and read only if every byte is as it was written.

A checkpoint is a folder `step-00001234` of safetensors and JSON; nothing in it is ever executed. It is written under a
hidden name, synced, and renamed in one move, so that a kill or a full disk at any moment leaves the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from evo.core.files import sha256, sync, write_json
from evo.training.state import TrainState

_FORMAT = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not belong to the run that reads it."""


def save(folder: Path, state: TrainState, *, corpus: str, keep: int) -> Path:
    """Write `state` to `folder`/step-…, with the fingerprint of its corpus; of all checkpoints keep the latest `keep`.

    Raises `OSError` or `SafetensorError` where the disk refuses; earlier checkpoints are then untouched.
    """
    target = folder / f"step-{state.step:08d}"
    temporary = folder / f".{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_model(state.model, str(temporary / "model.safetensors"))
        save_model(state.ema.model, str(temporary / "ema.safetensors"))
        save_file(_moments(state), temporary / "optimizer.safetensors")
        save_model(state.clock, str(temporary / "clock.safetensors"))
        save_model(state.extremes, str(temporary / "extremes.safetensors"))
        save_file(_random_states(), temporary / "random.safetensors")
        files = sorted(temporary.iterdir())
        facts = {
            "format": _FORMAT,
            "step": state.step,
            "skipped": int(state.skipped),
            "rejected": int(state.rejected),
            "corpus": corpus,
            "sha256": {file.name: sha256(file) for file in files},
        }
        for file in files:
            sync(file)
        write_json(temporary / "checkpoint.json", {"facts": facts, "sha256": _seal(facts)})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _remove(target)
    os.rename(temporary, target)
    sync(folder)
    for old in checkpoints(folder)[:-keep]:
        _remove(old)
    return target


def restore(folder: Path, state: TrainState, *, corpus: str) -> None:
    """Bring `state` to the latest whole checkpoint in `folder`; where there is none, leave it as it is.

    A damaged checkpoint is set aside with a warning and the one before it is read. Raises `CheckpointError` where all
    are damaged (they stay where they are), where the corpus is another one, or where the model has other parameters.
    """
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    damaged: dict[Path, CheckpointError] = {}
    for path in reversed(checkpoints(folder)):
        try:
            facts = _verified(path)
        except CheckpointError as error:
            damaged[path] = error
            continue
        if facts["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {facts['format']}, this version of evo reads {_FORMAT}")
        if facts["corpus"] != corpus:
            raise CheckpointError(
                f"{path} was trained on other text than the data has now: restore the text, or give a new --out"
            )
        _load(path, state)
        state.step = facts["step"]
        state.skipped.fill_(facts["skipped"])
        state.rejected.fill_(facts["rejected"])
        for other, error in damaged.items():
            aside = other.with_name(f"damaged-{other.name}")
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
            warnings.warn(f"{error}; set aside as {aside.name}, going on from {path.name}", stacklevel=2)
        return
    if damaged:
        reasons = "; ".join(map(str, damaged.values()))
        raise CheckpointError(f"no checkpoint is whole: {reasons}. Delete {folder} to start from the beginning")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*"))


def _verified(path: Path) -> dict[str, Any]:
    """What `path` says of itself, once every byte of it has been found to be as it was written."""
    try:
        sealed = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        facts, seal = sealed["facts"], sealed["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'checkpoint.json'} cannot be read ({error})") from error
    if _seal(facts) != seal:
        raise CheckpointError(f"{path / 'checkpoint.json'} is not what was written there")
    for name, digest in facts["sha256"].items():
        if not (path / name).exists() or sha256(path / name) != digest:
            raise CheckpointError(f"{path / name} is missing or not what was written there")
    return facts


def _seal(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _load(path: Path, state: TrainState) -> None:
    try:
        load_model(state.model, path / "model.safetensors")
        load_model(state.ema.model, path / "ema.safetensors")
        load_model(state.clock, path / "clock.safetensors")
        load_model(state.extremes, path / "extremes.safetensors")
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds a model of another shape: {error}") from error
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        kind, _, name = key.partition("/")
        moments.setdefault(name, {})[kind] = tensor
    for name, parameter in state.model.named_parameters():
        if name in moments:
            state.optimizer.state[parameter] = {k: t.to(parameter.device) for k, t in moments[name].items()}
    random = load_file(path / "random.safetensors")
    torch.set_rng_state(random.pop("cpu"))
    for device, value in random.items():
        if torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, device)


def _moments(state: TrainState) -> dict[str, Tensor]:
    """The optimizer's tensors, named kind/parameter, e.g. `exp_avg/head.weight`."""
    return {
        f"{kind}/{name}": tensor
        for name, parameter in state.model.named_parameters()
        for kind, tensor in state.optimizer.state.get(parameter, {}).items()
    }


def _random_states() -> dict[str, Tensor]:
    """States of the global generators, uint8, by device: for whatever draws from them between steps."""
    cuda = {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return {"cpu": torch.get_rng_state(), **cuda}


def _remove(path: Path) -> None:
    """Delete a checkpoint under a hidden name, so that a kill half-way leaves nothing that looks like one."""
    if path.exists():
        hidden = path.with_name(f".{path.name}-old")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(path, hidden)
        shutil.rmtree(hidden)
