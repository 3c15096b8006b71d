"""Runs of `train` over ranks, and what can befall them, for the tests beside."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evo import Evo
from evo.training import (
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    Preempted,
    TrainConfig,
    Trainer,
    train,
)
from evo.training.checkpoint import checkpoints
from evo.training.guard import Watch
from evo.training.manifest import Manifest
from evo.training.storage import read
from tests.conftest import random_model

STEPS = 20


def config(folder: Path, name: str, **changes) -> TrainConfig:
    """A run of twenty steps of four sequences on a hundred short documents that are packed with padding."""
    source = folder / "text"
    if not source.exists():
        source.mkdir()
        for i in range(100):
            (source / f"{i}.txt").write_text("abcde"[i % 5] * (i % 7 + 1) + f" line {i}\n")
    base = TrainConfig(
        data=source,
        out=folder / name,
        steps=STEPS,
        batch_size=8,
        length=24,
        log_every=1,
        save_every=5,
        progress=False,
        timeout=100.0,
        optimizer=OptimizerConfig(warmup=2, learning_rate=3e-3, ema=0.9),
        evaluation=EvaluationConfig(every=50, sequences=2, clock_values=1),
    )
    return replace(base, corpus=replace(base.corpus, packing="best_fit", held_out=0.1), **changes)


def model() -> Evo:
    return random_model(0, torch.float64, vocab_size=259, kv_heads=2, width=16, self_conditioning=True)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Model, average and moments of the last checkpoint, whole, whoever wrote it."""
    last = checkpoints(run / "checkpoints")[-1]
    table = Manifest.read(last).tensors
    found = {name: torch.empty(e.shape, dtype=e.dtype) for name, e in table.items() if not name.startswith("random/")}
    read(last, table, found)
    return found


def spread_runs(rank: int, world: int, folder: Path, cases: dict[str, ParallelConfig]) -> None:
    """One run for each case, in this job."""
    for name, parallel in cases.items():
        # What does not divide among ranks of the data is divided into passes.
        train(config(folder, name, parallel=parallel, micro_batch=2), model())


def preempted_run(rank: int, world: int, folder: Path, name: str, parallel: ParallelConfig, step: int) -> None:
    """A run of which the last rank alone is told to end after so many steps; all ranks leave together, with everything saved."""

    def tell(trainer: Trainer) -> None:
        if trainer.state.step == step and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer(config(folder, name, parallel=parallel), model=model(), after_step=[tell])
    with pytest.raises(Preempted) as ended:
        trainer.run()
    left = ended.value.step
    assert ended.value.code == 75
    assert checkpoints(folder / name / "checkpoints")[-1].name == f"step-{left:08d}"
    steps = [torch.zeros((), dtype=torch.int64) for _ in range(world)]
    dist.all_gather(steps, torch.tensor(left))
    assert {int(each) for each in steps} == {left}
    assert left in (step + 1, step + 2)


def two_ranks(rank: int, world: int, folder: Path, cases: dict[str, ParallelConfig]) -> None:
    """Runs to the end, and one that is told to end: in one job, since a job takes long to begin."""
    spread_runs(rank, world, folder, cases)
    preempted_run(rank, world, folder, "told", ParallelConfig(shard=2), 6)


def killed_run(rank: int, world: int, folder: Path, name: str, step: int) -> None:
    """A run of which one rank is killed after so many steps."""

    def strike(trainer: Trainer) -> None:
        if trainer.state.step == step and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    asked = config(folder, name, parallel=ParallelConfig(replicate=world))
    Trainer(asked, model=model(), after_step=[strike]).run()


def standing_still(rank: int, world: int, folder: Path) -> None:
    """One rank never comes to where the others wait for it."""
    with Watch(3.0) as watch:
        dist.barrier()
        watch.at("batch of step 3")
        if rank == 1:
            time.sleep(1000)
        watch.at("sums over ranks of step 3")
        dist.all_reduce(torch.ones(1))
