"""SIGKILL of one rank or of all, in the middle of saves: what is left is whole, and nothing is lost but steps since the last save."""

import multiprocessing
import os
import random
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from evo.training import Checkpointer
from evo.training.checkpoint import checkpoints
from evo.training.manifest import Manifest
from evo.training.state import TrainState
from tests.checkpoint_cases import OPTIMIZER


@pytest.fixture(scope="module")
def forks():
    """Processes forked from a server that has imported everything, so that each starts in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evo.training", "torch.distributed.fsdp"])
    return context


def begin(world=1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 64), nn.Linear(64, 37))
    if world == 1:
        return TrainState.begin(model, OPTIMIZER)
    mesh = init_device_mesh("cpu", (world,))
    return TrainState.begin(model, OPTIMIZER, spread=lambda whole: fully_shard(whole, mesh=mesh))


def save_for_ever(rank, world, store, folder: Path, steps):
    """Every step saves a state in which every weight is the number of the step."""
    torch.set_num_threads(1)
    if world > 1:
        timeout = timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    state = begin(world)
    with Checkpointer(folder, keep=3) as checkpointer:
        checkpointer.restore(state, corpus="text")
        assert all_weights_are(state, state.step), f"weights of another step than {state.step}"
        for _ in range(steps):
            state.step += 1
            set_weights(state)
            checkpointer.save(state, corpus="text")


def set_weights(state):
    with torch.no_grad():
        for parameter in (*state.model.parameters(), *state.ema.model.parameters()):
            parameter.fill_(state.step)


def all_weights_are(state, step):
    tensors = (*state.model.parameters(), *state.ema.model.parameters())
    return step == 0 or all(bool((parameter == step).all()) for parameter in tensors)


def assert_survives(forks, folder: Path, world, kills):
    chance = random.Random()
    place, newest = folder / "checkpoints", 0
    for kill in range(kills):
        before = checkpoints(place)
        ranks = [
            forks.Process(target=save_for_ever, args=(rank, world, folder / f"store-{kill}", place, 1_000_000))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        while checkpoints(place) == before and all(process.is_alive() for process in ranks):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        alone = world > 1 and chance.random() < 0.5
        killed = ranks[:1] if alone and chance.random() < 0.5 else ranks[-1:] if alone else ranks
        for process in killed:
            os.kill(process.pid, signal.SIGKILL)
        # Ranks that live on see that one is gone, and end.
        for process in ranks:
            process.join(60)
        assert [process.exitcode == -signal.SIGKILL for process in ranks] == [process in killed for process in ranks]
        assert all(process.exitcode for process in ranks)
        found = checkpoints(place)
        for path in found:
            Manifest.read(path).verify(path)
        steps = [Manifest.read(path).step for path in found]
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        assert len(steps) >= min(3, steps[-1])
        assert steps[-1] > newest
        newest = steps[-1]
    # One process goes on where they were.
    state = begin()
    with Checkpointer(place, keep=3) as checkpointer:
        checkpointer.restore(state, corpus="text")
    assert state.step == newest
    assert all_weights_are(state, newest)
    assert sorted(place.iterdir()) == checkpoints(place)


def test_a_process_killed_while_it_saves_loses_no_checkpoint(forks, tmp_path):
    assert_survives(forks, tmp_path, world=1, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_ranks_killed_while_they_save_lose_no_checkpoint(forks, tmp_path, world):
    assert_survives(forks, tmp_path, world=world, kills=20)
