"""A planted error in each property is caught by the check in `evo.testing` that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evo import Evo
from evo.schedules import Cosine, Path, Schedule, early_stop
from evo.solvers import (
    Ancestral,
    Euler,
    Exponential,
    FixedStep,
    Heun,
    Solver,
    TorchDiffEq,
)
from evo.testing import (
    PropertyError,
    check_duality,
    check_head,
    check_marginals,
    check_model_limits,
    check_plan,
    check_schedule,
    check_solver,
)
from tests.conftest import random_model


class WrongSign(Cosine):
    def d_signal(self, t: Tensor) -> Tensor:
        return -super().d_signal(t)


class LostHalf(Cosine):
    def log_snr(self, t: Tensor) -> Tensor:
        return super().log_snr(t) / 2


class Rising(Cosine):
    def signal(self, t: Tensor) -> Tensor:
        return super().noise(t)

    def noise(self, t: Tensor) -> Tensor:
        return super().signal(t)


class WrongInverse(Cosine):
    def level_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return super().level_of_log_snr(log_snr / 2)


class InfiniteAtOne(Cosine):
    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self.signal(t).log() - self.noise(t).log())


class Narrow(Cosine):
    def signal(self, t: Tensor) -> Tensor:
        return super().signal(t.float())


class PerSequence(Cosine):
    def noise(self, t: Tensor) -> Tensor:
        return super().noise(t.mean(-1, keepdim=True))


class WrongDrift(Cosine):
    def drift(self, t: Tensor) -> Tensor:
        return -super().drift(t)


class WrongDiffusion(Cosine):
    def diffusion(self, t: Tensor) -> Tensor:
        return super().diffusion(t) / 2**0.5


class WrongAlphaBar(Cosine):
    def alpha_bar(self, t: Tensor) -> Tensor:
        return self.signal(t)


class WrongSnrSlope(Cosine):
    def d_snr(self, t: Tensor) -> Tensor:
        return super().d_snr(t) / 2


class WrongScore(Cosine):
    def score_from_noise(self, noise: Tensor, level: Tensor) -> Tensor:
        return -super().score_from_noise(noise, level)


class WrongVelocity(Cosine):
    def velocity(self, denoised: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return super().velocity(denoised, -noise, level)


class Swapped(Cosine):
    def split_velocity(self, latents: Tensor, velocity: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        denoised, noise = super().split_velocity(latents, velocity, level)
        return noise, denoised


class FreshNoise(Cosine):
    def bridge(self, noise: Tensor, level: Tensor, new_level: Tensor, fresh: Tensor) -> Tensor:
        return fresh


class LosesVariance(Cosine):
    def bridge(self, noise: Tensor, level: Tensor, new_level: Tensor, fresh: Tensor) -> Tensor:
        return super().bridge(noise, level, new_level, fresh / 2)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (WrongSign(), "d_signal is the derivative of signal: at level .* it is .* and should be"),
        (LostHalf(), "log_snr is 2·ln"),
        (Rising(), "log_snr falls as the level rises: broken at level"),
        (WrongInverse(), "level_of_log_snr inverts log_snr"),
        (InfiniteAtOne(), r"log_snr is finite on \[0, 1\]: broken at level 0"),
        (Narrow(), "signal keeps the dtype of its level: torch.float64 gave torch.float32"),
        (PerSequence(), "noise keeps the shape of its level"),
        (WrongDrift(), "drift is signal'/signal"),
        (WrongDiffusion(), "diffusion² is"),
        (WrongAlphaBar(), "alpha_bar is signal²"),
        (WrongSnrSlope(), "d_snr is snr·d_log_snr"),
        (WrongScore(), "score_from_noise is −ε/noise"),
        (WrongVelocity(), "velocity is the derivative of noised"),
        (Swapped(), "split_velocity gives back the clean part"),
        (FreshNoise(), "bridge keeps √"),
        (LosesVariance(), "bridge keeps unit variance"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Schedule) else "",
)
def test_a_wrong_schedule_is_caught(mutant: Schedule, message: str) -> None:
    with pytest.raises(PropertyError, match=message):
        check_schedule(mutant)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (WrongDiffusion(), "the diffusion flow is f·z − ½g²·∇log p"),
        (WrongDrift(), "the diffusion flow is f·z − ½g²·∇log p"),
        (WrongInverse(), r"t\(s\) inverts s\(t\)"),
        (Rising(), "s runs from 0"),
        (WrongSnrSlope(), r"bits are conserved: .* at levels \(0\.6, 0\.3\)"),
        (FreshNoise(), "bits are conserved: .* at levels computed from the latents"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Schedule) else "",
)
def test_a_schedule_without_the_duality_is_caught(mutant: Schedule, message: str) -> None:
    with pytest.raises(PropertyError, match=message):
        check_duality(mutant)


@dataclass(frozen=True, kw_only=True)
class Scaled(Heun):
    """Second order, but the last digit of a weight is off: only the regression sees it."""

    weights = (0.5, 0.49)


@dataclass(frozen=True, kw_only=True)
class Backwards(Euler):
    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> tuple[Tensor, Any]:
        return super().step(field, latents, next_level, level, state)


@dataclass(frozen=True, kw_only=True)
class OneStepForAll(Euler):
    """Per-sequence averaging of a per-token time."""

    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> tuple[Tensor, Any]:
        return latents + (next_level - level).mean() * field(latents, level), None


@dataclass(frozen=True, kw_only=True)
class Remembering(Euler):
    """Adams–Bashforth that keeps the last velocity in itself rather than in the state."""

    memory: list[Tensor] = field(default_factory=list)

    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> tuple[Tensor, Any]:
        velocity = field(latents, level)
        previous = self.memory.pop() if self.memory else velocity
        self.memory.append(velocity)
        return latents + (next_level - level).unsqueeze(-1) * (1.5 * velocity - 0.5 * previous), None


@dataclass(frozen=True, kw_only=True)
class InPlace(Euler):
    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> tuple[Tensor, Any]:
        return latents.add_((next_level - level).unsqueeze(-1) * field(latents, level)), None


@dataclass(frozen=True, kw_only=True)
class Restless(Euler):
    """Moves by the fixed size of a step, also where there is none to take."""

    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> tuple[Tensor, Any]:
        moved, state = super().step(field, latents, level, next_level, state)
        return torch.where((level == next_level).unsqueeze(-1), latents + 1e-3, moved), state


@dataclass(frozen=True, kw_only=True)
class Thawing(Euler):
    """A solve of its own that forgets to hold frozen tokens."""

    def solve(self, problem: Any) -> Any:
        solution = super().solve(problem)
        return type(solution)(**{**vars(solution), "latents": torch.nan_to_num(solution.latents) + 1e-15})


@pytest.mark.parametrize(
    ("mutant", "order", "message"),
    [
        (Euler(), 2, r"the order of convergence is 2 ± 0.2: measured 1\."),
        (Scaled(), None, "the order of convergence is 2"),
        (Backwards(), None, "the order of convergence is 1 ± 0.2: measured 0.00"),
        (OneStepForAll(), None, "a token is solved as if it were alone"),
        (InPlace(), None, "leaves the latents it was given as they were"),
        (Restless(), None, "a step of no length moves nothing"),
        (Thawing(), None, "a frozen token comes back bit for bit"),
        (Remembering(), None, "remembers nothing from one solve to the next"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Solver) else "",
)
def test_a_wrong_solver_is_caught(mutant: FixedStep, order: float | None, message: str) -> None:
    with pytest.raises(PropertyError, match=message):
        check_solver(mutant, order=order)


def test_a_loose_adaptive_solver_is_caught() -> None:
    with pytest.raises(PropertyError, match="within its tolerance"):
        check_solver(TorchDiffEq("dopri5", rtol=1e-1, atol=1e-1), tolerance=1e-8)


@dataclass(frozen=True, kw_only=True)
class DoublesNoise(Ancestral):
    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> tuple[Tensor, Any]:
        stepped, state = super().step(field, latents, level, next_level, state)
        return stepped + 0.1 * torch.randn(latents.shape, generator=self.generator).double(), state


@dataclass(frozen=True, kw_only=True)
class GlobalNoise(Exponential):
    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> tuple[Tensor, Any]:
        torch.rand(())
        return super().step(field, latents, level, next_level, state)


def test_wrong_marginals_are_caught() -> None:
    with pytest.raises(PropertyError, match=r"the variance at level 0\.2 is that of the flow"):
        check_marginals(DoublesNoise(schedule=Cosine(), generator=torch.Generator(), steps=40))
    with pytest.raises(PropertyError, match="its own generator alone"):
        check_marginals(GlobalNoise(schedule=Cosine(), steps=10))


@dataclass(frozen=True, kw_only=True)
class Mutant(Path):
    """A path whose plan or whose clock is bent by a function."""

    plan: Callable[[Tensor], Tensor] = lambda plan: plan
    bend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda level, rate: (level, rate)

    def ramp(self, levels: Tensor, clock: Tensor, t_min: float) -> tuple[Tensor, Tensor]:
        return early_stop.ramp(levels, clock, t_min)

    def span(self, levels: Tensor, max_steps: int) -> tuple[Tensor | int, Tensor | int]:
        return early_stop.span(levels, max_steps)

    def at(self, levels: Tensor, clock: Tensor, t_min: float = 0.1) -> tuple[Tensor, Tensor]:
        return self.bend(*super().at(levels, clock, t_min))

    def __call__(self, levels: Tensor, max_steps: int, t_min: float = 0.1) -> Tensor:
        return self.plan(super().__call__(levels, max_steps, t_min))


def bump(plan: Tensor) -> Tensor:
    plan = plan.clone()
    plan[:, 1] = plan[:, 0] + 0.01
    plan[:, -1] = 0
    return plan


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (Mutant(plan=bump), r"no row of a plan of \d+ steps rises: broken at level"),
        (Mutant(plan=lambda plan: plan.flip(1)), "starts at t"),
        (Mutant(plan=lambda plan: plan[:, :-1]), "one row per step and one before"),
        (Mutant(plan=lambda plan: plan + 0.05 * (plan == 0)), "starts at t where"),
        (Mutant(plan=lambda plan: plan.float()), "keeps the dtype"),
        (Mutant(plan=lambda plan: torch.cat([plan[:, :1], plan[:, 1:] ** 2], dim=1)), "then on the path at clock"),
        (Mutant(bend=lambda level, rate: (level, -rate)), "the rate of a path is not negative"),
        (Mutant(bend=lambda level, rate: (level, rate / 2)), "the rate of a path is the speed at which it falls"),
        (Mutant(bend=lambda level, rate: (level * 0.9, rate)), "then on the path at clock"),
    ],
)
def test_a_wrong_path_is_caught(mutant: Path, message: str) -> None:
    with pytest.raises(PropertyError, match=message):
        check_plan(mutant)


class Pooled(nn.Module):
    def forward(self, hidden: Tensor, context_logits: Tensor) -> Tensor:
        return hidden.mean((1, 2)).sigmoid()[:, None].expand(hidden.shape[:2])


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"timestep_head": lambda hidden, logits: hidden[..., 0]}, r"a level lies in \[0, 1\]: broken at level"),
        ({"timestep_head": lambda hidden, logits: hidden.sigmoid()}, "one level per token"),
        ({"timestep_head": lambda hidden, logits: hidden[..., 0].sigmoid().bfloat16()}, "float32 or wider"),
        ({"timestep_head": Pooled()}, "chosen from its own position alone"),
        ({"prior": lambda logits, uniform: torch.zeros(logits.shape[:-1])}, "int64"),
        ({"prior": lambda logits, uniform: torch.full(logits.shape[:-1], 11)}, "ids of the vocabulary"),
        ({"prior": lambda logits, uniform: logits.argmin(-1)}, "never draws a token whose logit is −∞"),
        (
            {"prior": lambda logits, uniform: torch.distributions.Categorical(logits=logits).sample()},
            "its own logits and its own number alone",
        ),
        ({"prior": lambda logits, uniform: logits.exp_().argmax(-1)}, "leaves its logits as they were"),
        ({"decoder": lambda logits, denoised, embeddings, uniform: logits.argmin(-1)}, "logits and latent agree on"),
        ({"decoder": lambda logits, denoised, embeddings, uniform: logits}, "one token id per position"),
    ],
)
def test_a_wrong_head_is_caught(heads: dict[str, Any], message: str) -> None:
    with pytest.raises(PropertyError, match=message):
        check_head(**heads)


class Leaky(Evo):
    """Row i of the sketch has seen token i."""

    def sketch(self, latents: Tensor, level: Tensor, **options: Any) -> Tensor:
        return self.refine(latents, level)


class LostHalfEvo(Evo):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return type(out)(**{**vars(out), "flow_bits": 2 * out.flow_bits})


class Reconstructs(Evo):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return type(out)(**{**vars(out), "reconstruction": out.reconstruction + 1e-3})


class Overhears(Evo):
    """The prompt sees the window."""

    def refine(self, latents: Tensor, level: Tensor, *, prompt: Tensor | None = None, **options: Any) -> Tensor:
        return super().refine(latents, level, **options)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (Leaky, r"context logits of token 0 .*"),
        (LostHalfEvo, r"flow bits are the weighted denoising error"),
        (Reconstructs, r"the bound is the causal cross-entropy"),
        (Overhears, r"a field behind a cached prompt .*"),
    ],
)
def test_a_wrong_model_is_caught(mutant: type[Evo], message: str) -> None:
    model = random_model()
    model.__class__ = mutant
    with pytest.raises(PropertyError, match=message):
        check_model_limits(model)
