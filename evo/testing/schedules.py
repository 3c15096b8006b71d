"""What a noise schedule owes the library."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from evo.schedules import Schedule
from evo.schedules.conversions import EDGE
from evo.testing.errors import require, require_all, require_close, require_equal


def check_schedule(schedule: Schedule, *, tolerance: float = 1e-6) -> None:
    """Hold a schedule to what the library relies on; works on copies on the CPU.

    Values keep shape and dtype and are finite on all of [0, 1], and so are their gradients; the log-SNR falls, and signal/noise
    nowhere rises, the ends included; every derivative is the slope of its value (by five-point differences, for which there is a
    `tolerance`) and its gradient in the level; the inverse, the SDE coefficients and the conversions between denoised latent,
    noise, score and velocity agree with the values; the bridge keeps unit variance and the right correlation.
    `variance_preserving` says what is so. That the ends are exactly the word and exactly noise is not asked for: where signal and
    noise follow from a `log_snr` taken at `interior(t)`, they are what it is there.

    Raises PropertyError, naming the property, the level and the error.
    """
    require("t_min lies in (0, 1)", 0 < schedule.t_min < 1, f"it is {schedule.t_min}")
    with torch.no_grad():
        given, schedule = schedule, in_float64(schedule)
        level = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)
        values = ("signal", "noise", "log_snr", "snr")
        _check_form(given, *values)
        require_all("log_snr falls as the level rises", schedule.log_snr(level).diff() < 0, level=level[1:])
        _check_form(given, *(f"d_{value}" for value in values), "drift", "diffusion")
        _check_values(schedule, level)
        _check_derivatives(schedule, level, tolerance)
        _check_gradients(schedule, level)
        _check_inverse(schedule, level)
        _check_sde(schedule, level)
        _check_conversions(schedule, tolerance)
        _check_bridge(schedule)


def in_float64(schedule: Schedule) -> Schedule:
    """A copy to compute with: on the CPU, in float64."""
    return copy.deepcopy(schedule).to("cpu", torch.float64)


def _check_form(schedule: Schedule, *names: str) -> None:
    """Shape, dtype and finiteness of what these methods give, the ends included."""
    for dtype in (torch.float32, torch.float64):
        schedule = copy.deepcopy(schedule).to("cpu", dtype)
        for name in names:
            for level in (torch.linspace(0, 1, 12, dtype=dtype).view(3, 4), torch.tensor(0.5, dtype=dtype)):
                value = getattr(schedule, name)(level)
                shapes, dtypes = f"{tuple(level.shape)} gave {tuple(value.shape)}", f"{level.dtype} gave {value.dtype}"
                require(f"{name} keeps the shape of its level", value.shape == level.shape, shapes)
                require(f"{name} keeps the dtype of its level", value.dtype == level.dtype, dtypes)
                require_all(f"{name} is finite on [0, 1]", value.isfinite(), level=level)


def _check_values(schedule: Schedule, level: Tensor) -> None:
    signal, noise, log_snr = schedule.signal(level), schedule.noise(level), schedule.log_snr(level)
    require_all("signal is positive below level 1", signal > 0, level=level)
    require_all("noise is positive above level 0", noise > 0, level=level)
    require_close("log_snr is 2·ln(signal/noise)", log_snr, 2 * (signal / noise).log(), 1e-9, level=level)
    require_close("snr is signal²/noise²", schedule.snr(level), (signal / noise).square(), 1e-9, level=level)
    ends = torch.tensor([0.0, EDGE, 1 - EDGE, 1.0], dtype=torch.float64)
    angle = torch.atan2(schedule.noise(ends), schedule.signal(ends))
    require_all("signal/noise does not rise towards the ends", angle.diff()[::2] >= -1e-12, level=ends[::3])
    preserved = torch.allclose(signal**2 + noise**2, torch.ones_like(level), atol=1e-9, rtol=0)
    told = f"it is {schedule.variance_preserving}, and the sum is {'1' if preserved else 'not'} at every level"
    claim = "variance_preserving says whether signal² + noise² is 1"
    require(claim, bool(schedule.variance_preserving) == preserved, told)
    if preserved:
        require_close("alpha_bar is signal²", schedule.alpha_bar(level), signal**2, 1e-9, level=level)


def _check_derivatives(schedule: Schedule, level: Tensor, tolerance: float) -> None:
    for name in ("signal", "noise", "log_snr"):
        claimed, found = getattr(schedule, f"d_{name}")(level), slope(getattr(schedule, name), level)
        require_close(f"d_{name} is the derivative of {name}", claimed, found, tolerance, level=level)
    snr = schedule.snr(level)
    require_close("d_snr is snr·d_log_snr", schedule.d_snr(level), snr * schedule.d_log_snr(level), 1e-9, level=level)


def _check_gradients(schedule: Schedule, level: Tensor) -> None:
    """Levels are learned: what is computed from one must tell it how."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for name in ("signal", "noise", "log_snr"):
        claimed = getattr(schedule, f"d_{name}")(level)
        found = _gradient(getattr(schedule, name), level)
        require_close(f"the gradient of {name} in the level is d_{name}", found, claimed, 1e-6, level=level)
        found = _gradient(getattr(schedule, name), ends)
        require_all(f"the gradient of {name} is finite at the ends", found.isfinite(), level=ends)


@torch.enable_grad()
def _gradient(function: Callable[[Tensor], Tensor], level: Tensor) -> Tensor:
    """The derivative that automatic differentiation finds; 0 where it finds no way to the level."""
    leaf = level.clone().requires_grad_()
    total = function(leaf).sum()
    found = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    return torch.zeros_like(level) if found is None else found


def _check_inverse(schedule: Schedule, level: Tensor) -> None:
    back = schedule.level_of_log_snr(schedule.log_snr(level))
    require_close("level_of_log_snr inverts log_snr", back, level, 1e-9, level=level)


def _check_sde(schedule: Schedule, level: Tensor) -> None:
    """The SDE dz = f·z dt + g·dw of z = s·x + n·ε: f = s'/s, g² = (n²)' − 2·f·n² (Song et al. 2021, Eq. 5 and 29)."""
    signal, noise = schedule.signal(level), schedule.noise(level)
    drift, diffusion = schedule.drift(level), schedule.diffusion(level)
    require_close("drift is signal'/signal", drift, schedule.d_signal(level) / signal, 1e-9, level=level)
    variance_rate = 2 * noise * schedule.d_noise(level) - 2 * drift * noise**2
    require_close("diffusion² is (noise²)' − 2·drift·noise²", diffusion**2, variance_rate, 1e-8, level=level)
    require_all("diffusion is not negative", diffusion >= 0, level=level)


def _check_conversions(schedule: Schedule, tolerance: float) -> None:
    """Denoised latent, noise, score and velocity are four names for one thing, on [t_min, .99]."""
    generator = torch.Generator().manual_seed(0)
    level = torch.linspace(schedule.t_min, 0.99, 60, dtype=torch.float64).view(4, 15)
    clean, noise = torch.randn(2, 4, 15, 3, dtype=torch.float64, generator=generator)
    at = level[..., None]
    latents = schedule.noised(clean, noise, level)
    signal, spread = schedule.signal(level)[..., None], schedule.noise(level)[..., None]
    require_close("noised is signal·clean + noise·ε", latents, signal * clean + spread * noise, 1e-12, level=at)
    back = schedule.noise_from_denoised(latents, clean, level)
    require_close("noise_from_denoised inverts noised", back, noise, 1e-9, level=at)
    back = schedule.denoised_from_noise(latents, noise, level)
    require_close("denoised_from_noise inverts noised", back, clean, 1e-9, level=at)
    score = schedule.score_from_noise(noise, level)
    require_close("score_from_noise is −ε/noise", score, -noise / spread, 1e-12, level=at)
    back = schedule.noise_from_score(score, level)
    require_close("noise_from_score inverts score_from_noise", back, noise, 1e-9, level=at)
    velocity = schedule.velocity(clean, noise, level)
    found = slope(lambda t: schedule.noised(clean, noise, t.squeeze(-1)), at)
    require_close("velocity is the derivative of noised", velocity, found, tolerance, level=at)
    same = schedule.velocity_from_denoised(latents, clean, level)
    require_close("velocity_from_denoised agrees with velocity", same, velocity, 1e-8, level=at)
    denoised, back = schedule.split_velocity(latents, velocity, level)
    require_close("split_velocity gives back the clean part", denoised, clean, 1e-8, level=at)
    require_close("split_velocity gives back the noise part", back, noise, 1e-8, level=at)


def _check_bridge(schedule: Schedule) -> None:
    """The noise at a lower level continues the noise at a higher one, with ρ² = SNR(level)/SNR(new level)."""
    grid = torch.linspace(schedule.t_min, 1, 15, dtype=torch.float64)
    level, new_level = (x.flatten()[None] for x in torch.meshgrid(grid, grid, indexing="ij"))
    level, new_level = torch.maximum(level, new_level), torch.minimum(level, new_level)
    one, zero = torch.ones_like(level)[..., None], torch.zeros_like(level)[..., None]
    kept = schedule.bridge(one, level, new_level, zero)[..., 0]
    added = schedule.bridge(zero, level, new_level, one)[..., 0]
    at = {"level": level, "new_level": new_level}
    ratio = schedule.signal(level) / schedule.noise(level) * schedule.noise(new_level) / schedule.signal(new_level)
    correlation = torch.where(level == new_level, 1.0, ratio)  # also where both are 1 and the signal is gone
    require_close("bridge keeps √(SNR(level)/SNR(new level)) of the noise", kept, correlation, 1e-7, **at)
    require_close("bridge keeps unit variance", kept**2 + added**2, torch.ones_like(kept), 1e-9, **at)
    same = level == new_level
    require_equal("bridge to the same level changes nothing", kept[same], torch.ones_like(kept[same]))


def slope(function: Callable[[Tensor], Tensor], level: Tensor) -> Tensor:
    """Five-point difference in float64, with a step of 1e-5 of the distance to the nearer end, for functions singular there.

    Small enough that a kink of the derivative, as between the knots of a table, leaves less than 1e-6.
    """
    step = 1e-5 * torch.minimum(level, 1 - level)
    near = function(level + step) - function(level - step)
    far = function(level + 2 * step) - function(level - 2 * step)
    return (8 * near - far) / (12 * step)
