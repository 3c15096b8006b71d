"""The two flows of a score are one curve (P-1 to P-3), and the reverse-time SDE has its marginals (D-3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from evo.core.duality import autoregressive_flow, diffusion_flow, proposition_1
from evo.schedules import Cosine, Schedule, Shifted, TimeChange, VarianceExploding
from evo.solvers import (
    RK4,
    Ancestral,
    Euler,
    Exponential,
    ExponentialMultistep,
    FixedStep,
    Heun,
    Midpoint,
    Solver,
    TorchDiffEq,
    integrate,
)
from evo.testing import Gaussian, GaussianMixture, check_duality, check_marginals, strategies
from evo.testing.targets import uneven_gaussian

SCHEDULES = [make().double() for make in strategies.KINDS]
SCHEDULES += [Shifted(Cosine(), -2.0), Shifted(VarianceExploding(), 1.0)]
SOLVERS = [
    pytest.param(lambda _: Euler(steps=64), 5e-2, id="Euler"),
    pytest.param(lambda _: Heun(steps=64), 2e-3, id="Heun"),
    pytest.param(lambda _: Midpoint(steps=64), 2e-3, id="Midpoint"),
    pytest.param(lambda _: RK4(steps=32), 1e-4, id="RK4"),
    pytest.param(lambda schedule: Exponential(steps=64, schedule=schedule), 5e-2, id="Exponential"),
    pytest.param(lambda schedule: ExponentialMultistep(steps=64, schedule=schedule), 2e-3, id="ExponentialMultistep"),
    pytest.param(lambda _: TorchDiffEq("rk4", steps=32), 1e-4, id="rk4 of torchdiffeq"),
    pytest.param(lambda _: TorchDiffEq("dopri5", rtol=1e-6, atol=1e-6), 1e-4, id="dopri5 of torchdiffeq"),
]


def name(schedule: Schedule) -> str:
    kind = type(schedule).__name__
    return f"{kind}({name(schedule.schedule)})" if isinstance(schedule, Shifted) else kind


@pytest.fixture(params=SCHEDULES, ids=name)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return request.param


def test_every_schedule_has_the_duality(schedule: Schedule) -> None:
    check_duality(schedule)


# P-2: the two walks.


@given(strategies.mixture_targets(schedule=Cosine()))
@settings(max_examples=5)
def test_the_distance_of_the_two_walks_is_the_solvers_error_and_falls_with_its_order(target: GaussianMixture) -> None:
    latents = torch.randn(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def walk(steps: int) -> float:
        return proposition_1(Cosine(), target.score, latents, start=0.9, nodes=8, solver=RK4(steps=steps)).largest

    coarse, fine = walk(6), walk(12)
    assert coarse < 0.05
    assert fine < coarse / 8 or fine < 1e-11


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (Euler(steps=64), 0.1),
        (Heun(steps=32), 0.02),
        (Midpoint(steps=32), 0.02),
        (TorchDiffEq("dopri5", rtol=1e-6, atol=1e-8), 1e-4),
    ],
    ids=repr,
)
def test_any_solver_walks_both_flows(solver: Solver, tolerance: float) -> None:
    latents = torch.randn(1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curves = proposition_1(Cosine(), uneven_gaussian(Cosine()).score, latents, nodes=12, solver=solver)
    assert curves.largest < tolerance
    assert curves.slope_gap.max() < 1e-10
    assert curves.levels[0].item() == pytest.approx(TimeChange(Cosine()).t_max)
    assert curves.levels[-1].item() == Cosine().t_min
    assert curves.clock[0] == 1
    assert (curves.clock.diff() < 0).all()


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.6), (0.5, 0.0), (1.5, 0.1)])
def test_a_walk_that_does_not_go_down_is_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match="the walk goes down"):
        proposition_1(Cosine(), uneven_gaussian(Cosine()).score, torch.zeros(1, 1, 2).double(), start=start, end=end)


def test_the_paper_s_printed_flows_lose_the_marginals() -> None:
    """Eq. 14 flips the sign of the drift and, like Eq. 7, forgets the ½; the flow that keeps both carries a Gaussian exactly."""
    schedule, target = Cosine(), uneven_gaussian(Cosine())
    start, end = torch.full((1, 8), 0.9).double(), torch.full((1, 8), 0.3).double()
    latents = target.sample(start, 2, torch.Generator().manual_seed(0))
    exact = target.transport(latents, start, end)

    def flow(drift: float, share: float) -> Callable[[Tensor, Tensor], Tensor]:
        def field(latents: Tensor, level: Tensor) -> Tensor:
            f, g = schedule.drift(level)[..., None], schedule.diffusion(level)[..., None]
            return drift * f * latents - share * g**2 * target.score(latents, level)

        return field

    def error(field: Callable[[Tensor, Tensor], Tensor]) -> float:
        return (integrate(field, latents, start, end, solver=RK4(steps=60)).latents - exact).abs().max().item()

    assert error(flow(1, 0.5)) < 1e-6
    assert error(diffusion_flow(schedule, target.score)) < 1e-6
    for drift, share in ((-1, 1), (0, 1), (1, 1), (-1, 0.5)):
        assert error(flow(drift, share)) > 0.1


def test_the_autoregressive_flow_stands_still_where_the_score_is_zero() -> None:
    field = autoregressive_flow(TimeChange(Cosine()), lambda latents, level: torch.zeros_like(latents))
    assert (field(torch.ones(1, 2, 3).double(), torch.full((1, 2), 0.5).double()) == 0).all()


# S-2: every schedule under every solver.


@pytest.mark.parametrize(("make", "tolerance"), SOLVERS)
def test_every_solver_carries_a_gaussian_along_its_flow_on_every_schedule(
    schedule: Schedule, make: Callable[[Schedule], Solver], tolerance: float
) -> None:
    target = uneven_gaussian(schedule)
    start = torch.tensor([[0.7, 0.6, 0.3]], dtype=torch.float64)
    end = torch.tensor([[0.3, 0.4, 0.3]], dtype=torch.float64)
    latents = target.sample(start, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = integrate(target.velocity, latents, start, end, solver=make(schedule)).latents
    torch.testing.assert_close(found, target.transport(latents, start, end), rtol=tolerance, atol=tolerance)


# D-3: the SDE and the flow agree in their marginals.


def moments(solver: FixedStep, generator: torch.Generator, target: Gaussian, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (D,) that `solver` gives a Gaussian from .95 to .2, exactly: a step on it is affine, z' = A·z + c + B·ξ.

    A, c and B of all steps are read off three calls, each of which takes every step from a latent of its own.
    """
    levels = torch.linspace(0.95, 0.2, steps + 1, dtype=torch.float64)[:, None]
    shape = (steps, 1, 2)

    def step(latents: float, seed: int) -> Tensor:
        generator.manual_seed(seed)
        return solver.step(target.velocity, torch.full(shape, latents).double(), levels[:-1], levels[1:], None)[0][:, 0]

    def drawn(seed: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))[:, 0]

    slope = step(1.0, 0) - step(0.0, 0)
    noise = (step(0.0, 0) - step(0.0, 1)) / (drawn(0) - drawn(1))
    offset = step(0.0, 0) - noise * drawn(0)
    mean, variance = (x[0] for x in target.moments(levels[0]))
    for k in range(steps):
        mean, variance = slope[k] * mean + offset[k], slope[k] ** 2 * variance + noise[k] ** 2
    return mean, variance


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_sampling_has_the_marginals_of_the_flow_as_steps_grow(schedule: Schedule, eta: float) -> None:
    target, generator = uneven_gaussian(schedule), torch.Generator()
    solver = Ancestral(schedule=schedule, generator=generator, eta=eta)
    want = [x[0] for x in target.moments(torch.tensor([0.2], dtype=torch.float64))]
    with torch.no_grad():
        errors = [
            max((a - b).abs().max().item() for a, b in zip(moments(solver, generator, target, n), want, strict=True))
            for n in (256, 512)
        ]
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 0.02


def test_samples_of_the_sde_and_of_the_flow_have_the_marginals_of_a_gaussian() -> None:
    schedule = Cosine()
    check_marginals(
        Ancestral(schedule=schedule, generator=torch.Generator().manual_seed(0), steps=100), schedule=schedule
    )
    check_marginals(Exponential(schedule=schedule, steps=100), schedule=schedule)


def test_targets_under_one_schedule_agree_with_its_conversions(schedule: Schedule) -> None:
    """Score and denoiser are written apart from each other; `score_from_noise` must join them."""
    level = torch.tensor([[0.2, 0.5, 0.8]], dtype=torch.float64)
    latents = torch.randn(1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixture = GaussianMixture(
        schedule=schedule,
        weights=torch.tensor([0.7, 0.3]).double(),
        means=torch.tensor([[1.0, 0.0], [-1.0, 0.5]]).double(),
        variances=torch.tensor([0.2, 0.3]).double(),
    )
    for target in (uneven_gaussian(schedule), mixture):
        noise = schedule.noise_from_denoised(latents, target.denoised(latents, level), level)
        torch.testing.assert_close(
            schedule.score_from_noise(noise, level), target.score(latents, level), rtol=1e-9, atol=1e-9
        )
    one = dataclasses.replace(
        mixture, weights=torch.ones(1).double(), means=mixture.means[:1], variances=mixture.variances[:1]
    )
    same = Gaussian(schedule=schedule, mean=mixture.means[0], variance=mixture.variances[0])
    torch.testing.assert_close(one.score(latents, level), same.score(latents, level))
