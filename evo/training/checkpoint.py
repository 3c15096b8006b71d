"""Checkpoints that are written whole or not at all, and read only if every byte is as it was written.

A checkpoint is a folder `step-00001234` of safetensors, one file a rank, and a JSON manifest with their checksums; nothing
in it is ever executed. It is written under a hidden name, synced, and renamed in one move by one rank after all ranks have
written, so that a kill or a full disk at any moment leaves the one before. Any number of ranks reads it. On more than one
machine the folder must be on a file system that they share.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from evo.core import Evo, EvoConfig
from evo.core.composition import differences, second_names
from evo.core.serialization import assemble, write_pretrained
from evo.core.shards import write_tensors
from evo.files import sha256, sync
from evo.training.manifest import (
    CheckpointError,
    FormatError,
    Manifest,
    checkpoints,
    place,
    remove,
    remove_leftovers,
)
from evo.training.peers import Peers
from evo.training.state import TrainState
from evo.training.storage import Layout, Table, file_name, read

__all__ = ["CheckpointError", "Checkpointer", "SaveError", "averaged_model", "checkpoints", "export_average"]


class SaveError(OSError):
    """A checkpoint could not be written; those before it are untouched."""


class Checkpointer:
    """The checkpoints of one run in `folder`, saved and restored by all ranks of the job together.

    To be made by all ranks at once, each call to be made by all. A context manager that closes itself.

    Args:
        folder: of the checkpoints; made where it is not there.
        keep: how many, the latest, are kept; at least 1.
        background: write while training goes on. The state is copied to memory of the CPU (each rank copies what it writes,
            and keeps that memory), the rest happens in a thread; at most one save is under way, the next waits for it.
        timeout: how long a rank waits for the others; None is the default of `torch.distributed`.

    Raises:
        ValueError: for fewer than one to keep.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int, background: bool = True, timeout: timedelta | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; needed: 1 or more checkpoints, the latest")
        self.folder, self.keep, self.background = Path(folder), keep, background
        self._peers = Peers(timeout)
        self._layout = Layout(self._peers)
        self._staged: dict[str, Tensor] = {}
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._latest: Future[None] | None = None

    def save(self, state: TrainState, *, corpus: str) -> None:
        """Write `state` and the fingerprint of its corpus.

        A disk that refuses ends no training: a save that failed is a warning of the first rank (with `background` at the next
        save), and an error of `wait`. Whatever else fails, such as a rank that is gone, raises, with `background` at the next call.
        """
        if self.background:
            self._settle()
        manifest = Manifest(
            step=state.step,
            skipped=int(state.skipped),
            rejected=int(state.rejected),
            corpus=corpus,
            world=self._peers.count,
            config=None if state.config is None else state.config.to_json(),
            composition=state.composition,
            files={},
            tensors={},
        )
        random = _random_states(self._peers.rank, _device(state))
        self._stage(self._layout.share({**state.tensors(), **random}))
        self._latest = self._writer.submit(self._write, replace(manifest, tensors=self._layout.table))
        if not self.background:
            self._settle()

    def restore(self, state: TrainState, *, corpus: str) -> Path | None:
        """Bring `state` to the latest whole checkpoint and return where that is; without any leave `state` as it is.

        A damaged checkpoint is set aside with a warning and the one before it is read. The random states come back where as
        many ranks read as wrote.

        Raises `CheckpointError` where all are damaged (they stay where they are), where the corpus is another one, or where
        the model has other parameters or is composed otherwise.
        """
        self._settle()
        self._peers.from_first(lambda: remove_leftovers(self.folder))
        found, damaged = _newest(self.folder, self._peers)
        if found is None:
            return None
        path, manifest = found
        if manifest.corpus != corpus:
            raise CheckpointError(
                f"{path} was trained on other text than the data has now: restore the text, or give a new --out"
            )
        self._load(path, manifest, state)
        self._peers.from_first(lambda: _set_aside(damaged))
        if self._peers.first:
            for other, error in damaged.items():
                warnings.warn(f"{error}; set aside as damaged-{other.name}, going on from {path.name}", stacklevel=2)
        return path

    def wait(self) -> None:
        """Wait until the latest save is over. Raises `SaveError` where it failed."""
        if self._latest is not None:
            self._latest.result()

    def close(self) -> None:
        """Wait, and give back what saving has needed. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._peers.close()
            self._staged.clear()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except SaveError as error:
            # What ended the run comes first.
            if kind is None:
                raise
            self._warn(error)

    def _settle(self) -> None:
        try:
            self.wait()
        except SaveError as error:
            self._warn(error)

    def _warn(self, error: SaveError) -> None:
        if self._peers.first:
            warnings.warn(str(error), stacklevel=2)

    def _stage(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` to memory that no step changes; it is kept from save to save."""
        for name in self._staged.keys() - tensors.keys():
            del self._staged[name]
        for name, tensor in tensors.items():
            held = self._staged.get(name)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._staged[name] = held
            held.copy_(tensor, non_blocking=True)
        if any(tensor.device.type != "cpu" for tensor in tensors.values()):
            torch.accelerator.synchronize()

    def _write(self, manifest: Manifest) -> None:
        """All ranks write, then the first makes the checkpoint visible and drops the oldest ones."""
        peers, target = self._peers, place(self.folder, manifest.step)
        temporary = target.with_name(f".{target.name}")

        def begin() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def write() -> str:
            file = temporary / file_name(peers.rank)
            write_tensors(file, self._staged)
            return sha256(file)

        def finish(digests: list[str]) -> None:
            files = {file_name(rank): digest for rank, digest in enumerate(digests)}
            replace(manifest, files=files).write(temporary)
            remove(target)
            os.rename(temporary, target)
            sync(self.folder)
            for old in checkpoints(self.folder)[: -self.keep]:
                remove(old)

        try:
            peers.from_first(begin)
            peers.agree(write, finish)
        except OSError as error:
            if peers.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise SaveError(
                f"the checkpoint of step {manifest.step} could not be written ({error}); those before it in {self.folder} stay: "
                "make room there, or mend what the error names"
            ) from error

    def _load(self, path: Path, manifest: Manifest, state: TrainState) -> None:
        saved = manifest.tensors
        self._peers.agree(lambda: _needed(state), lambda needed: _check_same(path, saved, needed))
        if wrong := differences(manifest.composition, state.composition):
            raise CheckpointError(
                f"{path} holds a model that was composed otherwise: {wrong}. Compose this one alike, or give a new --out"
            )
        state.begin_moments({name: (entry.shape, entry.dtype) for name, entry in saved.items()})
        targets = state.tensors()
        random: dict[str, Tensor] = {}
        if manifest.world == self._peers.count:
            random = {
                name: torch.empty(saved[name].shape, dtype=torch.uint8)
                for name in _random_states(self._peers.rank, _device(state))
                if name in saved
            }
        read(path, saved, {**targets, **random})
        for name, value in random.items():
            _set_random_state(name.rpartition("/")[2], value)
        state.step = manifest.step
        state.skipped.fill_(manifest.skipped)
        state.rejected.fill_(manifest.rejected)


def averaged_model(folder: str | os.PathLike[str], step: int | None = None) -> Evo:
    """The averaged model, in evaluation mode, of a checkpoint in `folder`, read by this process alone: that of `step`, or the latest whole.

    Nothing in `folder` is changed; a damaged checkpoint that is passed over is a warning.

    Raises:
        FileNotFoundError: where there is no such checkpoint.
        CheckpointError: where it is damaged, or where its model was composed by hand.
    """
    path, manifest, weights = _average(Path(folder), step)
    if manifest.config is None:
        raise CheckpointError(
            f"the model in {path} was composed by hand and cannot be built from its checkpoint: "
            "use export_average (evo export), compose the model again, and call its load_weights"
        )
    return assemble(EvoConfig.from_json(manifest.config), weights)


def export_average(
    folder: str | os.PathLike[str], path: str | os.PathLike[str], step: int | None = None
) -> EvoConfig | None:
    """Write the model of `averaged_model` to a directory, also one composed by hand, which is not built for it.

    Returns:
        Its config, by which `Evo.from_pretrained` reads the directory; None where `load_weights` of a model composed alike does.

    Raises:
        FileNotFoundError: where there is no such checkpoint.
        CheckpointError: where it is damaged.
        FloatingPointError: where a weight is not a number.
    """
    found, manifest, weights = _average(Path(folder), step)
    config = None if manifest.config is None else EvoConfig.from_json(manifest.config)
    if spoilt := [name for name, weight in weights.items() if weight.isnan().any()]:
        raise FloatingPointError(
            f"the averaged weights in {found} are not numbers ({', '.join(spoilt[:4])}, {len(spoilt)} tensors in all), and no model is "
            "made of them: take an earlier checkpoint (evo export --step), or start a new run with a lower learning rate"
        )
    for name in second_names(manifest.composition):
        del weights[name]
    write_pretrained(path, weights, config, manifest.composition)
    return config


def _average(folder: Path, step: int | None) -> tuple[Path, Manifest, dict[str, Tensor]]:
    """A checkpoint, and the averaged weights in it, whole."""
    if step is None:
        found, damaged = _newest(folder, Peers(alone=True))
        for error in damaged.values():
            warnings.warn(f"{error}; passed over", stacklevel=2)
    else:
        path = place(folder, step)
        found = (path, _verified(path, Peers(alone=True))) if path.exists() else None
    if found is None:
        there = ", ".join(path.name for path in checkpoints(folder)) or "none"
        raise FileNotFoundError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {folder}; it has {there}"
        )
    path, manifest = found
    weights = {
        name: torch.empty(entry.shape, dtype=entry.dtype)
        for name, entry in manifest.tensors.items()
        if name.startswith("ema/")
    }
    read(path, manifest.tensors, weights)
    return path, manifest, {name.removeprefix("ema/"): weight for name, weight in weights.items()}


def _newest(folder: Path, peers: Peers) -> tuple[tuple[Path, Manifest] | None, dict[Path, CheckpointError]]:
    """The latest checkpoint of which every byte is as it was written, and the damaged ones after it.

    The ranks divide the files among them and agree. Raises `CheckpointError` where there are only damaged ones.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path in reversed(peers.from_first(lambda: checkpoints(folder))):
        try:
            return (path, _verified(path, peers)), damaged
        except FormatError:
            raise
        except CheckpointError as error:
            damaged[path] = error
    if damaged:
        reasons = "; ".join(map(str, damaged.values()))
        raise CheckpointError(f"no checkpoint is whole: {reasons}. Delete {folder} to start from the beginning")
    return None, damaged


def _verified(path: Path, peers: Peers) -> Manifest:
    manifest = peers.from_first(lambda: Manifest.read(path))
    peers.agree(lambda: manifest.verify(path, peers.rank, peers.count), lambda _: None)
    return manifest


def _set_aside(damaged: Iterable[Path]) -> None:
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def _needed(state: TrainState) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what a checkpoint must have for `state`; moments are made to fit what it has."""
    return {
        name: (tuple(tensor.shape), tensor.dtype)
        for name, tensor in state.tensors().items()
        if not name.startswith("optimizer/")
    }


def _check_same(path: Path, saved: Table, needed: Sequence[Mapping[str, tuple[tuple[int, ...], torch.dtype]]]) -> None:
    """That the ranks together need what is there, and nothing else."""
    together = {name: kind for each in needed for name, kind in each.items()}
    there = {name: (e.shape, e.dtype) for name, e in saved.items() if not name.startswith(("optimizer/", "random/"))}
    wrong = [
        f"{name} is {there.get(name, 'missing')} there and {together.get(name, 'missing')} here"
        for name in sorted(together.keys() | there.keys())
        if together.get(name) != there.get(name)
    ]
    if wrong:
        raise CheckpointError(
            f"{path} holds a model of another shape: {'; '.join(wrong[:4])}, {len(wrong)} such in all"
        )


def _device(state: TrainState) -> torch.device:
    return state.skipped.device


def _random_states(rank: int, device: torch.device) -> dict[str, Tensor]:
    """States of this rank's global generators, uint8: for whatever draws from them between steps."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return {f"random/{rank}/{name}": state for name, state in states.items()}


def _set_random_state(name: str, value: Tensor) -> None:
    if name == "cpu":
        torch.set_rng_state(value)
    else:
        torch.get_device_module(name).set_rng_state(value)
