"""`evo.testing`: our own parts pass, what cannot be checked is refused, and errors that hide well are found."""

from __future__ import annotations

import builtins
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import evo
from evo.heads import EntropyTimestep, FixedTimestep, LinearDecoder, NearestNeighborDecoder, NucleusPrior, TimestepHead
from evo.schedules import Cosine, Path, Schedule, Shifted, VarianceExploding, interior
from evo.schedules.plans import EarlyStop
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
    PropertyError,
    check_head,
    check_marginals,
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


@pytest.mark.parametrize("head", [TimestepHead(16), FixedTimestep(0.3), EntropyTimestep(power=0.5)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_levels_are_float32_or_wider(head: torch.nn.Module, dtype: torch.dtype) -> None:
    levels = head(torch.randn(2, 3, 16), torch.randn(2, 3, 5).to(dtype))
    assert levels.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_entropy_has_a_finite_gradient_where_the_context_is_certain(power: float) -> None:
    logits = torch.tensor([[[0.0, -torch.inf, -torch.inf], [200.0, 0.0, 0.0], [1.0, 0.0, 0.0]]], requires_grad=True)
    levels = EntropyTimestep(power=power)(torch.zeros(1, 3, 4), logits)
    levels.sum().backward()
    assert levels[0, 0] == 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, 2] != 0).all()


@pytest.mark.parametrize("room", ["heads", "schedules", "solvers"])
def test_a_room_can_be_copied_out(room: str) -> None:
    for file in (FilePath(evo.__file__).parent / room).glob("*.py"):
        assert not re.search(r"^\s*(from|import) evo\b", file.read_text(encoding="utf-8"), re.MULTILINE), file


# What hides well: each of these passed once.


class OtherSequences(torch.nn.Module):
    def forward(self, hidden: Tensor, context_logits: Tensor) -> Tensor:
        return (hidden - hidden.mean(0))[..., 0].sigmoid()


def ranked(logits: Tensor, uniform: Tensor) -> Tensor:
    """A prior whose number is the rank of its number among those of the batch."""
    return NucleusPrior()(logits, uniform.argsort(0) / len(uniform))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"timestep_head": OtherSequences()}, "a level does not depend on the other sequences of its batch"),
        ({"prior": ranked}, "its own logits and its own number alone"),
        (
            {
                "decoder": lambda logits, denoised, table, uniform: (
                    logits - logits.nan_to_num(0, 0, 0).mean(0)
                ).argmax(-1)
            },
            "a decoder reads a token as if it were alone",
        ),
    ],
)
def test_heads_that_look_at_other_sequences_are_caught(heads: dict[str, Any], message: str) -> None:
    with pytest.raises(PropertyError, match=message):
        check_head(**heads)


class RisingLine(Schedule):
    def log_snr(self, t: Tensor) -> Tensor:
        return 16 * t - 8


class UndeclaredSum(Cosine):
    variance_preserving = False


class Cut(Cosine):
    def noise(self, t: Tensor) -> Tensor:
        return super().noise(t.detach())


class NoisyWord(Cosine):
    def noise(self, t: Tensor) -> Tensor:
        return torch.where(t == 0, 0.3, super().noise(t))


class SteepEnd(Cosine):
    def noise(self, t: Tensor) -> Tensor:
        return (super().noise(t).square()).sqrt()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (RisingLine(), "log_snr falls as the level rises: broken at level 0.00"),
        (UndeclaredSum(), "variance_preserving says whether signal² . noise² is 1: it is False, and the sum is 1"),
        (Cut(), "the gradient of noise in the level is d_noise"),
        (NoisyWord(), "signal/noise does not rise towards the ends: broken at level 0"),
        (SteepEnd(), "the gradient of noise is finite at the ends: broken at level 0"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Schedule) else "",
)
def test_schedules_that_are_wrong_at_an_end_or_in_a_gradient_are_caught(schedule: Schedule, message: str) -> None:
    with pytest.raises(PropertyError, match=message):
        check_schedule(schedule)


def test_a_schedule_written_at_interior_levels_passes() -> None:
    class Written(Schedule):
        def log_snr(self, t: Tensor) -> Tensor:
            return -2 * (torch.pi / 2 * interior(t)).tan().log()

    check_schedule(Written())


@dataclass(frozen=True, kw_only=True, repr=False)
class Narrow(EarlyStop):
    """The bound would draw its clock from half of what tokens move in."""

    share: float = 0.5

    def stretch(self, levels: Tensor, t_min: float = 0.1) -> tuple[Tensor, Tensor]:
        begin, end = super().stretch(levels, t_min)
        return begin, self.share * end


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (Narrow(), "nothing moves outside the stretch of a path: broken at level .*, clock .*, rate 1"),
        (Narrow(share=2.0), r"the stretch of a path lies in \[0, 1\]: broken at begin 0, end 1\."),
    ],
)
def test_a_path_whose_stretch_is_wrong_is_caught(path: Path, message: str) -> None:
    with pytest.raises(PropertyError, match=message):
        check_plan(path)


def test_a_sampler_of_the_usual_seed_has_the_right_marginals() -> None:
    generator = torch.Generator().manual_seed(0)
    check_marginals(Ancestral(steps=60, schedule=Cosine(), generator=generator))


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
