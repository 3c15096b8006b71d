"""Randomness as a function of (seed, purpose, step): a run that resumes needs no memory of what was drawn before."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """Each purpose draws from a stream of its own, so that a change to one moves no other."""

    DATA = 0
    LEVELS = 1
    DROPOUT = 2
    WINDOWS = 3
    EVALUATION = 4
    COMMON = 5


def derive(seed: int, purpose: Purpose, *indices: int) -> int:
    """A 64-bit seed for `purpose` at `indices` (step, pass, …); distinct arguments give unrelated streams."""
    return int(np.random.SeedSequence((seed, purpose, *indices)).generate_state(1, np.uint64)[0])


def generator(device: torch.device | str, seed: int, purpose: Purpose, *indices: int) -> torch.Generator:
    """A fresh `torch.Generator` on `device`, seeded by `derive`."""
    return torch.Generator(device).manual_seed(derive(seed, purpose, *indices))


def generators(
    device: torch.device | str, seed: int, purpose: Purpose, step: int, rows: Iterable[int]
) -> list[torch.Generator]:
    """One for each row of a step's batch, the same whoever holds the row and beside whom."""
    return [generator(device, seed, purpose, step, row) for row in rows]
