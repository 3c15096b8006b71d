"""What every benchmark here needs: two things timed in turn in one process, the machine described, a table, a JSON file."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evo import files


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Options that all benchmarks share; results go to benchmarks/out/`name`.json unless told otherwise."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, mps, ...")
    options.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "out" / f"{name}.json", help="JSON to write"
    )
    return options


def keep_memory() -> None:
    """Have glibc keep freed memory, as a training run soon does; elsewhere, do nothing. Call it before timing on a CPU.

    By default it may hand the tensors of every step back to the kernel, or not, depending on what was allocated before:
    the same loop then took 9 or 48 ms.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_trim_threshold, 1 << 30)
        libc.mallopt(m_mmap_threshold, 1 << 25)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine that figures were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{device.type}: {name}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Comparison:
    """Times of two things in milliseconds (medians), and the median and spread of their ratio, round by round."""

    first_ms: float
    second_ms: float
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


def compare(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    device: torch.device,
    rounds: int = 40,
    seconds: float = 0.02,
) -> Comparison:
    """How long `first` takes in units of `second`; `low` and `high` are the 10th and 90th percentile over rounds.

    In each round both are repeated for about `seconds`, one right after the other and the order changing, so that what
    else the machine is doing falls on both. Both run once untimed, which pays for compilation and caches.
    """
    repeats = [max(1, round(seconds / _time(work, 1, device, warm_up=True))) for work in (first, second)]
    times = []
    for turn in range(rounds):
        pair = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            pair[which] = _time((first, second)[which], repeats[which], device)
        times.append(pair)
    ratios = [a / b for a, b in times]
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    medians = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
    return Comparison(*medians, ratio=statistics.median(ratios), low=tenths[0], high=tenths[-1])


def _time(work: Callable[[], object], repeats: int, device: torch.device, *, warm_up: bool = False) -> float:
    """Seconds per call."""
    if warm_up:
        work()
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - begun) / repeats


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` whole or not at all, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, data)
    print(f"wrote {path}")
