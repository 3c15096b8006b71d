"""Small rows of the ablation benchmark."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.ablation.data import puzzles
from benchmarks.ablation.run import Row
from benchmarks.ablation.sizes import SIZES
from benchmarks.ablation.tasks.parity import ReversedParities

CPU = torch.device("cpu")
PARITY = puzzles(ReversedParities(bits=4), 8, 4)
TINY = replace(SIZES["nano"], width=16, depth=1, step_tokens=64)


def small(**changes: object) -> Row:
    row = Row(table="planning", task="parity", size="nano", variant="learned", seed=0, budget=200, test_size=4)
    return replace(row, **changes)
