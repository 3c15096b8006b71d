"""Figures of a run: sums over steps, lines of JSON, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evo.files import write_text


class MetricsLog:
    """A file of JSON lines, one record each, with `kind` and `step` first; and the same for TensorBoard on request.

    Opened at step `upto`, it keeps the lines up to that step and drops what a run that was cut off wrote beyond it, whole or not. A disk
    that refuses ends no training: it is a warning, and lines wait until there is room, as many as the buffer of a file holds.

    Args:
        path: of the file; None keeps the latest records and writes none, as on all ranks but the first.
        upto: steps made.
        tensorboard: folder for TensorBoard; None is without.

    Attributes:
        latest: the latest record of each kind.

    Raises:
        ImportError: where TensorBoard is asked for and not installed.
    """

    def __init__(self, path: Path | None, upto: int, tensorboard: Path | None = None) -> None:
        self.latest: dict[str, dict[str, Any]] = {}
        self._file, self._board = None, None
        if path is None:
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if (record := _record(line)) is not None and record["step"] <= upto]
        if kept != lines:
            write_text(path, "".join(kept))
        self.latest = {record["kind"]: record for record in map(json.loads, kept)}
        if tensorboard is not None:
            self._board = _board(tensorboard, upto)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a record; a figure that is not finite becomes null."""
        self.latest[kind] = {"kind": kind, "step": step, **_finite(values)}
        if self._file is not None:
            with _refusals(self._file.name):
                self._file.write(json.dumps(self.latest[kind]) + "\n")
                self._file.flush()
        if self._board is not None:
            for name, value in _scalars(values, kind):
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Have all lines on the disk: a checkpoint must not be newer than its metrics."""
        if self._file is not None:
            with _refusals(self._file.name):
                os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with _refusals(self._file.name):
                self._file.close()
        if self._board is not None:
            self._board.close()


class Meter:
    """Sums of figures over steps, kept on the device and read all at once, so that no step waits for the figures of another."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._sums: Tensor | float = 0.0
        self._counted: Tensor | int = 0
        self._steps = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin to count time anew, after a pause that was no training; to be called right after `read`."""
        self._start = time.perf_counter()

    def add(self, counted: Tensor, figures: Tensor) -> None:
        """Add the figures (F,) of a step if the 0-dim bool `counted` holds."""
        self._sums = self._sums + torch.where(counted, figures, 0.0)
        self._counted = self._counted + counted
        self._steps += 1

    def read(self) -> tuple[list[float], int, float]:
        """Sums of the figures, how many steps they are of, and steps a second, those that did not count among them; then start anew."""
        sums = self._sums.tolist() if isinstance(self._sums, Tensor) else []
        counted, speed = int(self._counted), self._steps / (time.perf_counter() - self._start)
        self._restart()
        return sums, counted, speed


def memory_bytes(device: torch.device) -> int:
    """The most that has been in use at once: of a GPU by tensors, elsewhere by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def _record(line: str) -> dict[str, Any] | None:
    """The record in a line; None where there is none, as a power cut may leave behind the last checkpoint."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if line.endswith("\n") and isinstance(record, dict) and {"kind", "step"} <= record.keys() else None


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Tell in a warning that the disk refuses, and go on."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"figures could not be written to {path} ({error}): make room there", stacklevel=4)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(value: Any, name: str) -> list[tuple[str, float]]:
    """The numbers in a tree of figures, with names like paths."""
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in _scalars(inner, f"{name}/{key}")]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [found for index, inner in enumerate(value) for found in _scalars(inner, f"{name}/{index}")]
    return [(name, value)] if isinstance(value, (int, float)) else []


def _board(folder: Path, upto: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("figures for TensorBoard need it: pip install 'evo-lm[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=upto + 1)
