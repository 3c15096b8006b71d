"""The solvers that know a noise schedule: `Exponential`, `ExponentialMultistep`, `Ancestral`."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evo.schedules import Cosine, LinearVP, RectifiedFlow, Schedule, VarianceExploding
from evo.solvers import RK4, Ancestral, Exponential, ExponentialMultistep, Heun, TorchDiffEq, integrate
from evo.testing import Gaussian

from .solver_problems import GaussianFlow, MixtureFlow, Spans, order_of, spans

SCHEDULES = [Cosine(), LinearVP(), RectifiedFlow(), VarianceExploding()]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("solver", [Exponential, ExponentialMultistep])
@settings(max_examples=3)
@given(problem=spans(low=0.1, high=0.9, dim=24))
def test_order_on_per_token_spans(solver: type, schedule: Schedule, problem: Spans) -> None:
    flow = GaussianFlow(schedule=schedule)
    exact = flow.solution(problem.latents, problem.start, problem.end)
    order = order_of(lambda steps: solver(steps=steps, schedule=schedule), flow, exact, problem, (64, 128, 256))
    assert abs(order - solver.order) < 0.2


@pytest.mark.parametrize("solver", [Exponential, ExponentialMultistep])
@pytest.mark.parametrize("start", [0.7, 1.0])
def test_order_on_scalar_spans_pure_noise_included(solver: type, start: float) -> None:
    flow, latents = (
        MixtureFlow(Cosine()),
        torch.randn(4, 8, 3, dtype=torch.float64),
    )
    exact = integrate(flow, latents, start, 0.1, solver=RK4(steps=400)).latents
    order = order_of(
        lambda steps: solver(steps=steps, schedule=Cosine()), flow, exact, Spans(latents, start, 0.1), (64, 128, 256)
    )
    assert abs(order - solver.order) < 0.2


def ddim(latents: Tensor, noise: Tensor, alpha_bar: float, next_alpha_bar: float) -> Tensor:
    """DDIM without added noise, as Song et al. (2021) write it, eq. 12, with their α for ᾱ."""
    predicted = (latents - math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha_bar)
    return math.sqrt(next_alpha_bar) * predicted + math.sqrt(1 - next_alpha_bar) * noise


@given(seed=st.integers(0, 2**32 - 1), start=st.floats(0.2, 0.95), share=st.just(0.0) | st.floats(0.01, 0.99))
def test_one_exponential_step_is_ddim(seed: int, start: float, share: float) -> None:
    schedule, end = Cosine(), share * start
    latents = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flow = MixtureFlow(schedule, dim=4)
    level = torch.full((2, 3), start, dtype=torch.float64)
    _, noise = schedule.split_velocity(latents, flow(latents, level), level)
    expected = ddim(latents, noise, math.cos(math.pi / 2 * start) ** 2, math.cos(math.pi / 2 * end) ** 2)
    found = integrate(flow, latents, start, end, solver=Exponential(steps=1, schedule=schedule)).latents
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    # From pure noise ᾱ is 0: ε̂ is the latent, and x̂ what is expected of the data without having seen any.
    ending = math.cos(math.pi / 2 * end) * flow.means.mean(0) + math.sin(math.pi / 2 * end) * latents
    found = integrate(flow, latents, 1.0, end, solver=Exponential(steps=1, schedule=schedule)).latents
    assert torch.allclose(found, ending, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("solver", [Exponential, ExponentialMultistep])
@given(problem=spans(), steps=st.integers(1, 4))
def test_exact_while_the_denoised_latents_stay(solver: type, schedule: Schedule, problem: Spans, steps: int) -> None:
    clean = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    noise = problem.latents

    def flow(latents: Tensor, level: Tensor) -> Tensor:
        return schedule.velocity(clean.expand_as(latents), noise, level)

    latents = schedule.noised(clean, noise, problem.start)
    found = integrate(flow, latents, problem.start, problem.end, solver=solver(steps=steps, schedule=schedule)).latents
    exact = schedule.noised(clean, noise, problem.end)
    # Derivatives are those at 1e-4 closer to the end than that, and so is what a velocity taken there is split into.
    assert torch.allclose(found, exact, rtol=1e-2 if (problem.start == 1).any() else 1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("solver", [Exponential, ExponentialMultistep])
def test_from_pure_noise_to_the_word_without_nan(solver: type, schedule: Schedule) -> None:
    for dtype in (torch.float32, torch.float64):
        latents = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
        flow = MixtureFlow(schedule)
        solution = integrate(flow, latents, 1.0, 0.0, solver=solver(steps=30, schedule=schedule))
        assert solution.latents.isfinite().all()
        assert solution.nfe == 30


def walk(flow: MixtureFlow, latents: Tensor, rows: Tensor, *, forget: bool = False) -> Tensor:
    """`ExponentialMultistep` along rows (S+1,) of levels, with its memory or without."""
    solver, state = ExponentialMultistep(schedule=flow.schedule), None
    for level, next_level in pairwise(rows):
        level, next_level = level.expand(latents.shape[:2]), next_level.expand(latents.shape[:2])
        latents, state = solver.step(flow, latents, level, next_level, None if forget else state)
    return latents


def slope(errors: list[Tensor], steps: list[int]) -> float:
    return math.log(errors[0].item() / errors[-1].item()) / math.log(steps[-1] / steps[0])


def test_multistep_keeps_its_order_on_uneven_steps_and_loses_it_without_memory() -> None:
    flow, latents = (
        MixtureFlow(Cosine()),
        torch.randn(4, 8, 3, dtype=torch.float64),
    )
    exact = integrate(flow, latents, 0.9, 0.1, solver=RK4(steps=400)).latents
    counts, uneven, forgetful = [64, 128, 256], [], []
    for steps in counts:
        clock = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        wobble = clock + torch.tensor([0.0, 0.6]).repeat(steps)[: steps + 1] / steps * (clock < 1)
        rows = 0.9 - 0.8 * wobble  # steps of 1.6/steps and 0.4/steps in turn
        uneven.append((walk(flow, latents, rows) - exact).abs().max())
        forgetful.append((walk(flow, latents, rows, forget=True) - exact).abs().max())
    assert abs(slope(uneven, counts) - 2) < 0.2
    assert abs(slope(forgetful, counts) - 1) < 0.2


def multistep_in_log_snr(flow: MixtureFlow, latents: Tensor, levels: Tensor) -> Tensor:
    """DPM-Solver++(2M) as published (Lu et al. 2022, algorithm 2), in λ = log(s/n), at `levels` (S+1,)."""
    schedule, previous, r = flow.schedule, None, None
    lambdas = schedule.log_snr(levels) / 2
    for k, (level, next_level) in enumerate(pairwise(levels)):
        t = level.expand(latents.shape[:2])
        denoised, _ = schedule.split_velocity(latents, flow(latents, t), t)
        h = lambdas[k + 1] - lambdas[k]
        if k:
            r = (lambdas[k] - lambdas[k - 1]) / h
        extrapolated = denoised if r is None else (1 + 1 / (2 * r)) * denoised - previous / (2 * r)
        ratio = schedule.noise(next_level) / schedule.noise(level)
        latents = ratio * latents - schedule.signal(next_level) * torch.expm1(-h) * extrapolated
        previous = denoised
    return latents


@pytest.mark.parametrize("start", [0.7, 1.0])
def test_the_angle_keeps_the_order_from_pure_noise_where_log_snr_loses_it(start: float) -> None:
    flow, latents = MixtureFlow(Cosine()), torch.randn(4, 8, 3, dtype=torch.float64)
    exact = integrate(flow, latents, start, 0.1, solver=RK4(steps=400)).latents
    counts, theirs, ours = [128, 256, 512], [], []
    for steps in counts:
        levels = torch.linspace(start, 0.1, steps + 1, dtype=torch.float64)
        theirs.append((multistep_in_log_snr(flow, latents, levels) - exact).square().mean().sqrt())
        ours.append((walk(flow, latents, levels) - exact).square().mean().sqrt())
    assert abs(slope(ours, counts) - 2) < 0.2
    if start == 1.0:
        assert slope(theirs, counts) < 1.85
        assert ours[-1] < theirs[-1] / 2, (ours, theirs)
    else:
        assert abs(slope(theirs, counts) - 2) < 0.2


def test_a_waiting_token_starts_anew_without_harm() -> None:
    flow, latents = MixtureFlow(Cosine()), torch.randn(1, 2, 3, dtype=torch.float64)
    solver = ExponentialMultistep(schedule=flow.schedule)
    levels = torch.linspace(0.8, 0.2, 13, dtype=torch.float64)
    waiting = torch.cat((levels[:1].repeat(5), levels))
    alone, state = latents[:, :1], None
    for k in range(12):
        alone, state = solver.step(flow, alone, levels[k].view(1, 1), levels[k + 1].view(1, 1), state)
    both, state = latents, None
    for k in range(17):
        rows = [torch.stack((waiting[j], levels[min(j, 12)])).view(1, 2) for j in (k, k + 1)]
        both, state = solver.step(flow, both, *rows, state)
    assert torch.allclose(both[:, 0], alone[:, 0], rtol=0, atol=1e-12)


def test_a_token_may_wait_at_the_word_and_then_rise() -> None:
    flow, z, state = MixtureFlow(Cosine()), torch.randn(1, 1, 3, dtype=torch.float64), None
    levels = torch.tensor([0.0, 0.0, 0.1, 0.2], dtype=torch.float64)
    for level, next_level in pairwise(levels):
        z, state = ExponentialMultistep(schedule=flow.schedule).step(
            flow, z, level.view(1, 1), next_level.view(1, 1), state
        )
    assert z.isfinite().all()


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("solver", "order"), [(Heun, 2), (RK4, 4)])
def test_order_from_noise_to_level_zero(schedule: Schedule, solver: Any, order: int) -> None:
    mean, variance = torch.tensor([0.5, 0.2], dtype=torch.float64)
    data = Gaussian(schedule=schedule, mean=mean, variance=variance)
    latents = torch.randn(4, 8, 3, dtype=torch.float64)
    exact = data.transport(latents, torch.ones(4, 8).double(), torch.zeros(4, 8).double())
    found = order_of(lambda n: solver(steps=n), data.velocity, exact, Spans(latents, 1.0, 0.0), (64, 128, 256))
    assert abs(found - order) < 0.2
    tight = integrate(data.velocity, latents, 1.0, solver=TorchDiffEq("dopri5", rtol=1e-6, atol=1e-6))
    assert tight.nfe < 100
    assert torch.allclose(tight.latents, exact, rtol=0, atol=1e-5)


def test_multistep_order_falls_below_two_in_a_step_to_noise_zero_and_not_before() -> None:
    flow = GaussianFlow(schedule=Cosine())
    latents = torch.randn(4, 8, 3, dtype=torch.float64)
    orders = []
    for end in (0.1, 0.0):
        exact = flow.solution(latents, 1.0, end)
        problem = Spans(latents, 1.0, end)
        orders.append(
            order_of(
                lambda n: ExponentialMultistep(steps=n, schedule=flow.schedule), flow, exact, problem, (128, 256, 512)
            )
        )
    assert abs(orders[0] - 2) < 0.2
    assert 1.5 < orders[1] < 2


@given(problem=spans(low=0.05), seed=st.integers(0, 2**32 - 1))
def test_ancestral_draws_from_its_generator_and_from_nothing_else(problem: Spans, seed: int) -> None:
    def sample(seed: int) -> Tensor:
        solver = Ancestral(steps=3, schedule=Cosine(), generator=torch.Generator().manual_seed(seed))
        return integrate(MixtureFlow(Cosine()), problem.latents, problem.start, problem.end, solver=solver).latents

    before = torch.get_rng_state()
    first, again, other = sample(seed), sample(seed), sample(seed + 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first[~problem.frozen], other[~problem.frozen])
    assert torch.equal(first[problem.frozen], problem.latents[problem.frozen])


@given(problem=spans(low=0.05), seed=st.integers(0, 2**31))
def test_with_a_generator_each_sequences_are_sampled_as_if_alone(problem: Spans, seed: int) -> None:
    def sample(rows: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed + row) for row in rows]
        solver, flow = Ancestral(steps=3, schedule=Cosine(), generator=generators), MixtureFlow(Cosine())
        return integrate(flow, problem.latents[rows], problem.start[rows], problem.end[rows], solver=solver).latents

    everyone = list(range(len(problem.latents)))
    alone = torch.cat([sample([row]) for row in everyone])
    assert torch.allclose(sample(everyone), alone, rtol=0, atol=1e-12)
    assert torch.allclose(sample(everyone[::-1]), alone.flip(0), rtol=0, atol=1e-12)


def test_generators_that_are_not_one_for_each_sequence_are_counted() -> None:
    solver = Ancestral(steps=1, schedule=Cosine(), generator=[torch.Generator()] * 3)
    with pytest.raises(ValueError, match="3 generators for 2 sequences: it needs one for all, or one for each"):
        integrate(MixtureFlow(Cosine()), torch.zeros(2, 1, 3), 1.0, solver=solver)
    with pytest.raises(ValueError, match="Ancestral has no generator"):
        integrate(MixtureFlow(Cosine()), torch.zeros(2, 1, 3), 1.0, solver=Ancestral(steps=1, schedule=Cosine()))


@given(seed=st.integers(0, 2**31), short=st.integers(1, 140), more=st.integers(0, 70))
def test_with_a_generator_each_a_step_does_not_know_how_many_tokens_follow(seed: int, short: int, more: int) -> None:
    latents = torch.ones(1, short + more, 3, dtype=torch.float64)
    first, second = (
        Ancestral(schedule=Cosine(), generator=[torch.Generator().manual_seed(seed)]).step(
            lambda latents, level: -latents, part, 0.8 * part[..., 0], 0.4 * part[..., 0], None
        )[0]
        for part in (latents, latents[:, :short])
    )
    assert torch.equal(first[:, :short], second)


@given(problem=spans(low=0.05), steps=st.integers(1, 4))
def test_ancestral_without_fresh_noise_is_exponential(problem: Spans, steps: int) -> None:
    flow, generator = MixtureFlow(Cosine()), torch.Generator()
    ancestral = Ancestral(steps=steps, schedule=Cosine(), generator=generator, eta=0.0)
    exponential = Exponential(steps=steps, schedule=Cosine())
    found = [
        integrate(flow, problem.latents, problem.start, problem.end, solver=s).latents for s in (ancestral, exponential)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_ancestral_has_the_marginals_of_the_flow(schedule: Schedule, eta: float) -> None:
    flow, generator = GaussianFlow(schedule=schedule), torch.Generator().manual_seed(0)
    start, end, count = (torch.tensor(t, dtype=torch.float64) for t in (0.9, 0.3, 20_000))
    noise = torch.randn(1, 1, int(count), generator=generator, dtype=torch.float64)
    latents = (
        schedule.signal(start) * flow.mean
        + (schedule.signal(start) ** 2 * 0.3 + schedule.noise(start) ** 2).sqrt() * noise
    )
    solver = Ancestral(steps=100, schedule=schedule, generator=generator, eta=eta)
    samples = integrate(flow, latents, start, end, solver=solver).latents
    mean = schedule.signal(end) * flow.mean
    variance = schedule.signal(end) ** 2 * 0.3 + schedule.noise(end) ** 2
    assert (samples.mean() - mean).abs() < 5 * (variance / count).sqrt()
    assert (samples.var() / variance - 1).abs() < 5 * (2 / count).sqrt() + 0.02  # and the bias of 100 steps


def test_ancestral_is_deterministic_towards_noise() -> None:
    flow, latents = MixtureFlow(Cosine()), torch.randn(1, 2, 3, dtype=torch.float64)
    ancestral = Ancestral(steps=5, schedule=Cosine(), generator=torch.Generator())
    up = integrate(flow, latents, 0.2, 0.8, solver=ancestral).latents
    assert torch.allclose(
        up, integrate(flow, latents, 0.2, 0.8, solver=Exponential(steps=5, schedule=Cosine())).latents
    )


@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan])
def test_eta_is_checked(eta: float) -> None:
    with pytest.raises(ValueError, match="share of the noise to redraw"):
        Ancestral(steps=1, schedule=Cosine(), generator=torch.Generator(), eta=eta)
