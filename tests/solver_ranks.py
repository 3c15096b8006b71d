"""Two ranks with different data under one adaptive solver; run by tests/test_torchdiffeq.py as a program."""

from __future__ import annotations

import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from evo.solvers import SolverError, TorchDiffEq, integrate

SOLVER = TorchDiffEq("dopri5", rtol=1e-4, atol=1e-4)


def gathered(value: int) -> list[int]:
    values = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    dist.all_gather(values, torch.tensor(value))
    return [int(v) for v in values]


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )

    def field(latents: Tensor, level: Tensor) -> Tensor:
        dist.all_reduce(torch.ones(1))  # as in a sharded model: hangs unless all ranks take the same steps
        return torch.cos(20 * rank * level).unsqueeze(-1) * latents

    latents = torch.ones(1 + rank, 2, 3, dtype=torch.float64)
    evaluations = gathered(integrate(field, latents, 1.0, 0.1, solver=SOLVER).nfe)
    assert evaluations[0] == evaluations[1] > 30, evaluations

    frozen = torch.full((1 + rank, 2), 0.1 + 0.9 * rank, dtype=torch.float64)  # all of rank 0
    solution = integrate(field, latents, frozen, 0.1, solver=SOLVER)
    assert gathered(solution.nfe) == [solution.nfe] * 2
    assert rank or torch.equal(solution.latents, latents)

    def broken(latents: Tensor, level: Tensor) -> Tensor:
        return field(latents, level) + (float("nan") if rank and level.min() < 0.5 else 0.0)

    with pytest.raises(SolverError, match="NaN or infinity" if rank else "another rank"):
        integrate(broken, latents, 1.0, 0.1, solver=SOLVER)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, args=(str(Path(folder) / "store"),), nprocs=2, start_method="fork")
