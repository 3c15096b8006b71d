"""C-1: denoised latent, noise, score and velocity are one thing; and the bridge keeps the noise of a latent one path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evo.schedules import Cosine, RectifiedFlow, Schedule, Shifted
from evo.testing import Gaussian
from tests.test_schedules import close, every_schedule, few, trained

F64 = torch.float64
levels = st.lists(st.floats(0.1, 0.999), min_size=6, max_size=6).map(lambda x: torch.tensor(x, dtype=F64).view(2, 3))
seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@every_schedule
@few
@given(level=levels, seed=seeds)
def test_conversions_invert_each_other(schedule: Schedule, level: Tensor, seed: int) -> None:
    clean, noise = normal(seed, 2, 2, 3, 4)
    latents = schedule.noised(clean, noise, level)
    # Dividing by a small signal enlarges rounding by its inverse.
    tolerance = 1e-14 * (1 + (schedule.noise(level) / schedule.signal(level)).max().item())
    close(schedule.noise_from_denoised(latents, clean, level), noise, 1e-12)
    close(schedule.denoised_from_noise(latents, noise, level), clean, tolerance)
    close(schedule.noise_from_score(schedule.score_from_noise(noise, level), level), noise, 1e-14)
    velocity = schedule.velocity(clean, noise, level)
    close(schedule.velocity_from_denoised(latents, clean, level), velocity, 1e-9)
    for part, wanted in zip(schedule.split_velocity(latents, velocity, level), (clean, noise), strict=True):
        close(part, wanted, 100 * tolerance)


@every_schedule
@few
@given(level=levels, seed=seeds)
def test_velocity_is_the_derivative_of_the_latent(schedule: Schedule, level: Tensor, seed: int) -> None:
    clean, noise = normal(seed, 2, 2, 3, 4)
    _, slope = torch.autograd.functional.jvp(
        lambda t: schedule.noised(clean, noise, t), level, torch.ones_like(level), strict=False
    )
    close(schedule.velocity(clean, noise, level), slope, 1e-10)


@every_schedule
@few
@given(level=levels, seed=seeds)
def test_score_is_that_of_the_noising_kernel(schedule: Schedule, level: Tensor, seed: int) -> None:
    clean, noise = normal(seed, 2, 2, 3, 4)
    latents = schedule.noised(clean, noise, level).detach().requires_grad_()
    mean = schedule.signal(level).detach().unsqueeze(-1) * clean
    spread = schedule.noise(level).detach().unsqueeze(-1)
    density = torch.distributions.Normal(mean, spread).log_prob(latents).sum()
    (score,) = torch.autograd.grad(density, latents)
    close(schedule.score_from_noise(noise, level), score, 1e-10)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_conversions_are_finite_at_the_ends(schedule: Schedule, dtype: torch.dtype) -> None:
    level = torch.tensor([[0.0, 1.0, 0.5]], dtype=dtype)
    clean, noise = normal(0, 2, 1, 3, 4, dtype=dtype)
    latents = schedule.noised(clean, noise, level)
    velocity = schedule.velocity(clean, noise, level)
    results = [
        latents,
        velocity,
        schedule.noise_from_denoised(latents, clean, level),
        schedule.denoised_from_noise(latents, noise, level),
        schedule.score_from_noise(noise, level),
        schedule.velocity_from_denoised(latents, clean, level),
        *schedule.split_velocity(latents, velocity, level),
    ]
    for result in results:
        assert result.shape == latents.shape
        assert result.dtype == dtype
        assert result.isfinite().all()


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_realised_token_is_known_without_noise(schedule: Schedule, dtype: torch.dtype) -> None:
    zero = torch.zeros(1, 3, dtype=dtype)
    clean = normal(0, 1, 3, 4, dtype=dtype)
    latents = schedule.noised(clean, torch.zeros_like(clean), zero)
    assert (schedule.noise_from_denoised(latents, clean, zero) == 0).all()
    wanted = schedule.d_signal(zero).unsqueeze(-1) * clean
    assert torch.equal(schedule.velocity_from_denoised(latents, clean, zero), wanted)


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow(), Shifted(Cosine(), -2.0)])
def test_noise_tells_nothing_of_the_word_at_level_one(schedule: Schedule) -> None:
    noise, one = normal(0, 1, 3, 4), torch.ones(1, 3, dtype=F64)
    assert (schedule.denoised_from_noise(noise, noise, one) == 0).all()


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow(), Shifted(Cosine(), -2.0), trained()])
@few
@given(mean=st.floats(-1, 1), variance=st.floats(0.05, 2))
def test_the_flow_of_a_density_at_level_zero(schedule: Schedule, mean: float, variance: float) -> None:
    data = Gaussian(schedule=schedule, mean=torch.tensor(mean, dtype=F64), variance=torch.tensor(variance, dtype=F64))
    latents, zero = normal(0, 1, 3, 4), torch.zeros(1, 3, dtype=F64)
    signal = schedule.d_signal(zero).unsqueeze(-1)
    close(data.velocity(latents, zero), signal * latents, 1e-11)  # F = f·z − ½g²·score, with f = s' and g = 0


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow(), Shifted(Cosine(), -2.0)])
def test_pure_noise_is_its_own_noise(schedule: Schedule) -> None:
    latents, denoised = normal(0, 2, 1, 2, 4)
    one = torch.ones(1, 2, dtype=F64)
    assert torch.equal(schedule.noise_from_denoised(latents, denoised, one), latents)
    assert torch.equal(schedule.noised(denoised, latents, one), latents)
    assert torch.equal(schedule.noised(denoised, latents, torch.zeros_like(one)), denoised)


# The bridge


@every_schedule
@few
@given(seed=seeds, steps=st.lists(st.floats(0.02, 1), min_size=2, max_size=3, unique=True))
def test_bridge_is_one_gaussian_path(schedule: Schedule, seed: int, steps: list[float]) -> None:
    # What a bridge keeps of the old noise and takes of the fresh: its coefficients are read off with 0 and 1.
    def coefficients(level: float, new_level: float) -> tuple[Tensor, Tensor]:
        at = [torch.tensor([[x]], dtype=F64) for x in (level, new_level)]
        one, zero = torch.ones(1, 1, 1, dtype=F64), torch.zeros(1, 1, 1, dtype=F64)
        return schedule.bridge(one, *at, zero), schedule.bridge(zero, *at, one)

    falling = sorted(steps, reverse=True)
    kept, drawn = coefficients(falling[0], falling[-1])
    close(kept**2 + drawn**2, torch.ones_like(kept), 1e-14)
    first, last = torch.tensor([falling[0], falling[-1]], dtype=F64)
    ratio = (schedule.signal(first) / schedule.noise(first)) ** 2 / (schedule.signal(last) / schedule.noise(last)) ** 2
    close(kept.squeeze() ** 2, ratio, 1e-12)
    # Two bridges in turn are one.
    if len(falling) == 3:
        close(coefficients(falling[0], falling[1])[0] * coefficients(falling[1], falling[2])[0], kept, 1e-12)


@every_schedule
def test_bridge_in_the_limits(schedule: Schedule) -> None:
    noise, fresh = normal(0, 2, 1, 4, 5, dtype=torch.float32)
    same = torch.tensor([[0.0, 0.3, 0.7, 1.0]])
    assert torch.equal(schedule.bridge(noise, same, same, fresh), noise)
    one = torch.ones_like(same)
    bridged = schedule.bridge(noise, one, torch.tensor([[0.0, 0.3, 0.7, 0.9]]), fresh)
    if schedule.signal(one).eq(0).all():
        assert torch.equal(bridged, fresh)
    assert bridged.isfinite().all()


def test_bridge_agrees_with_brownian_motion() -> None:
    # z/s = e + w(n²/s²): draw w at both levels, and compare the covariance of the noises with what the bridge keeps.
    schedule, samples = Cosine(), 20_000
    low, high = torch.tensor([0.3, 0.6], dtype=F64)
    variance = torch.stack([(schedule.noise(t) / schedule.signal(t)) ** 2 for t in (low, high)])
    first, second = normal(0, 2, samples)
    walk_low = variance[0].sqrt() * first
    walk_high = walk_low + (variance[1] - variance[0]).sqrt() * second
    correlation = torch.corrcoef(torch.stack([walk_low, walk_high]))[0, 1]
    shape = (samples, 1)
    noise = (walk_high / variance[1].sqrt()).view(*shape, 1)
    bridged = schedule.bridge(noise, high.expand(shape), low.expand(shape), normal(1, *shape, 1))
    again = torch.corrcoef(torch.stack([bridged.flatten(), walk_high]))[0, 1]
    assert abs(correlation - again) < 5 * 2**0.5 / samples**0.5


def test_gradients_through_the_bridge_are_finite() -> None:
    level = torch.tensor([[0.5, 0.5, 1.0, 0.0]], dtype=F64, requires_grad=True)
    noise, fresh = (x.requires_grad_() for x in normal(0, 2, 1, 4, 3))
    Cosine().bridge(noise, level, level * torch.tensor([1.0, 0.9, 0.5, 1.0]), fresh).sum().backward()
    assert level.grad is None
    assert noise.grad.isfinite().all()
    assert fresh.grad.isfinite().all()
