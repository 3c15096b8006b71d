"""`evo.testing`: our own parts pass, and what cannot be checked is refused."""

from __future__ import annotations

import builtins
import importlib
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evo.heads import EntropyTimestep, FixedTimestep, LinearDecoder, NearestNeighborDecoder, NucleusPrior, TimestepHead
from evo.schedules import Cosine, Path, Schedule, Shifted, VarianceExploding
from evo.solvers import (
    RK4,
    Ancestral,
    Euler,
    Exponential,
    ExponentialMultistep,
    FixedStep,
    Heun,
    Midpoint,
    TorchDiffEq,
)
from evo.testing import (
    check_head,
    check_model_limits,
    check_plan,
    check_schedule,
    check_solver,
    strategies,
)
from tests.conftest import random_model


@given(strategies.schedules())
@settings(max_examples=12)
def test_our_schedules_pass(schedule: Schedule) -> None:
    check_schedule(schedule)


def test_a_schedule_of_one_method_passes() -> None:
    class Linear(Schedule):
        def log_snr(self, t: Tensor) -> Tensor:
            return 8 - 16 * t

    check_schedule(Linear())


@pytest.mark.parametrize(
    "solver",
    [
        Euler(),
        Heun(),
        Midpoint(),
        RK4(),
        Exponential(schedule=Cosine()),
        ExponentialMultistep(schedule=Cosine()),
        Ancestral(schedule=Cosine(), generator=torch.Generator(), eta=0.0),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_our_solvers_pass(solver: FixedStep) -> None:
    check_solver(solver)


def test_solvers_of_torchdiffeq_pass() -> None:
    check_solver(lambda steps: TorchDiffEq("heun2", steps=steps), order=2)
    check_solver(TorchDiffEq("dopri5", rtol=1e-7, atol=1e-7), tolerance=1e-5)


@given(st.integers(1, 6).flatmap(lambda tokens: st.tuples(st.just(tokens), strategies.paths(tokens))))
@settings(max_examples=10)
def test_our_paths_pass(drawn: tuple[int, Path]) -> None:
    tokens, path = drawn
    check_plan(path, tokens=tokens)


def test_our_heads_pass() -> None:
    check_head(timestep_head=TimestepHead(16))
    check_head(timestep_head=FixedTimestep(1.0))
    check_head(timestep_head=EntropyTimestep(), prior=NucleusPrior(), decoder=LinearDecoder())
    check_head(prior=NucleusPrior(temperature=0.0), decoder=NearestNeighborDecoder())


@pytest.mark.parametrize("schedule", [Cosine(), VarianceExploding()], ids=lambda schedule: type(schedule).__name__)
def test_our_model_passes(schedule: Schedule) -> None:
    model = random_model()
    model.schedule = schedule
    check_model_limits(model)


def test_a_solver_of_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="tolerance"):
        check_solver(TorchDiffEq("dopri5", rtol=1e-6, atol=1e-6))
    with pytest.raises(ValueError, match="order"):
        check_solver(lambda steps: Euler(steps=steps))


def test_no_head_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a timestep_head, a prior or a decoder"):
        check_head()


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="context"):
        check_model_limits(random_model(), length=1000)


def test_checks_leave_what_they_check_as_it_was() -> None:
    schedule, model = Shifted(Cosine(), 1.0), random_model(dtype=torch.float32).train()
    check_schedule(schedule)
    check_model_limits(model)
    assert model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


# Strategies.


@given(
    strategies.levels(2, 3),
    strategies.spans(),
    strategies.plans(),
    strategies.gaussian_targets() | strategies.mixture_targets(),
)
def test_strategies_give_what_they_say(levels: Tensor, spans: tuple[Tensor, Tensor], plan: Tensor, target: Any) -> None:
    start, end = spans
    assert levels.shape == (2, 3)
    assert levels.dtype == torch.float64
    assert ((levels >= 0) & (levels <= 1)).all()
    assert start.shape == end.shape
    assert ((end >= 0.1) & (end <= start + 1e-12) & (start <= 1)).all()
    assert (plan.diff(dim=1) <= 0).all()
    level = torch.full((1, 2), 0.5, dtype=torch.float64)
    assert target.score(torch.zeros(1, 2, 2, dtype=torch.float64), level).isfinite().all()


def test_without_hypothesis_all_but_the_strategies_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_hypothesis(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "hypothesis":
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hypothesis)
    for module in [name for name in sys.modules if name.startswith("evo.testing")]:
        monkeypatch.delitem(sys.modules, module)
    importlib.import_module("evo.testing")
    with pytest.raises(ImportError, match="pip install"):
        importlib.import_module("evo.testing.strategies")
