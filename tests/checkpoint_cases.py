"""Small states of training, and ways to damage a file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from evo import Evo
from evo.training import OptimizerConfig
from evo.training.state import TrainState

OPTIMIZER = OptimizerConfig(warmup=2)
SIZE = {"vocab_size": 5, "width": 16, "depth": 2, "heads": 1, "latent_dim": 8, "context": 12, "dropout": 0.0}


def toy(seed: int = 0) -> nn.Module:
    """Two layers; the last of three is never trained."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 1))


def advance(state: TrainState) -> None:
    """One step: all but the last layer get gradients, and moments with them."""
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(state.step))
    state.model[1](state.model[0](inputs)).square().mean().backward()  # pyright: ignore[reportIndexIssue]
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(state.model, state.step)
    state.clock.squares += torch.rand(len(state.clock.squares))
    state.extremes.weights += torch.rand(2)
    state.step += 1


def state_after(steps: int, model: nn.Module | None = None) -> TrainState:
    """A toy's state after so many steps, always the same."""
    state = TrainState.begin(toy() if model is None else model, OPTIMIZER)
    torch.manual_seed(1)
    for _ in range(steps):
        advance(state)
    return state


def small_evo() -> Evo:
    """An Evo of a few thousand float64 weights; no dimension of its tables divides by 4."""
    torch.manual_seed(0)
    return Evo.from_preset("tiny", **SIZE).double()


def assert_same_state(one: TrainState, other: TrainState) -> None:
    """Bit for bit."""
    mine, theirs = one.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for count in ("step", "skipped", "rejected"):
        assert int(getattr(one, count)) == int(getattr(other, count)), count


def flip(path: Path, place: float) -> None:
    """Another bit somewhere."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


def cut(path: Path, place: float) -> None:
    """Cut short."""
    os.truncate(path, int(place * path.stat().st_size))


def take_away(path: Path, _: float) -> None:
    """Gone."""
    path.unlink()


DAMAGES = [flip, cut, take_away]
