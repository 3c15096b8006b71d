"""Metrics as JSON lines, and the sums they are made of."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evo.core.files import write_text


class MetricsLog:
    """A file of JSON lines, one record each, with `kind` and `step` first.

    Opened at step `upto`, it keeps the lines up to that step and drops what a run that was cut off wrote beyond it.
    """

    def __init__(self, path: Path, upto: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= upto]
        if kept != lines:
            write_text(path, "".join(kept))
        self.latest = {record["kind"]: record for record in map(json.loads, kept)}
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a record; a figure that is not finite becomes null."""
        self.latest[kind] = {"kind": kind, "step": step, **_finite(values)}
        self._file.write(json.dumps(self.latest[kind]) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have all lines on the disk: a checkpoint must not be newer than its metrics."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Meter:
    """Means over steps, summed on the device and read all at once, so that no step waits for the figures of another."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count: Tensor | int = 0
        self._tokens = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin to count time anew, after a pause that was no training; to be called right after `read`."""
        self._start = time.perf_counter()

    def add(self, counted: Tensor, tokens: int, values: dict[str, Tensor]) -> None:
        """Add the 0-dim `values` of a step of `tokens` tokens, if the 0-dim bool `counted` holds."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + torch.where(counted, value.detach(), 0.0)
        self._count = self._count + counted
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Mean of each value over the counted steps (NaN if none), and `tokens_per_second`; then start anew."""
        count = int(self._count)
        means = {name: total.item() / count if count else math.nan for name, total in self._sums.items()}
        means["tokens_per_second"] = self._tokens / (time.perf_counter() - self._start)
        self._restart()
        return means
