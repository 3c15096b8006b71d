"""Flows with closed-form solutions, and random spans, for the tests of solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from evo.schedules import Schedule
from evo.solvers import Solver, integrate


def riccati(latents: Tensor, level: Tensor) -> Tensor:
    """dz/dt = −t·z²: nonlinear, not autonomous, element by element."""
    return -level.unsqueeze(-1) * latents**2


def riccati_solution(latents: Tensor, start: float | Tensor, end: float | Tensor) -> Tensor:
    """1/z(end) = 1/z(start) + (end² − start²)/2."""
    shape = latents.shape[:2]
    start, end = (torch.as_tensor(t, dtype=latents.dtype).expand(shape).unsqueeze(-1) for t in (start, end))
    return latents / (1 + latents * (end**2 - start**2) / 2)


@dataclass(frozen=True, kw_only=True)
class GaussianFlow:
    """The probability flow of data N(mean, variance) under a schedule; (z − s·mean)/√(s²·variance + n²) is constant."""

    schedule: Schedule
    mean: float = 0.7
    variance: float = 0.3

    def __call__(self, latents: Tensor, level: Tensor) -> Tensor:
        signal, spread = self.schedule.signal(level).unsqueeze(-1), self._spread(level)
        denoised = self.mean + signal * self.variance / spread**2 * (latents - signal * self.mean)
        noise = self.schedule.noise(level).unsqueeze(-1) / spread**2 * (latents - signal * self.mean)
        return self.schedule.velocity(denoised, noise, level)

    def _spread(self, level: Tensor) -> Tensor:
        return (self.schedule.signal(level) ** 2 * self.variance + self.schedule.noise(level) ** 2).sqrt().unsqueeze(-1)

    def solution(self, latents: Tensor, start: float | Tensor, end: float | Tensor) -> Tensor:
        shape = latents.shape[:2]
        start, end = (torch.as_tensor(t, dtype=latents.dtype).expand(shape) for t in (start, end))
        signal, end_signal = self.schedule.signal(start).unsqueeze(-1), self.schedule.signal(end).unsqueeze(-1)
        whitened = (latents - signal * self.mean) / self._spread(start)
        return end_signal * self.mean + self._spread(end) * whitened


class MixtureFlow:
    """The probability flow of a mixture of Gaussians with random means, as tokens make it; every token on its own."""

    def __init__(self, schedule: Schedule, components: int = 5, dim: int = 3, variance: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(components)
        self.schedule = schedule
        self.variance = variance
        self.means = 1.5 * torch.randn(components, dim, generator=generator, dtype=torch.float64)

    def __call__(self, latents: Tensor, level: Tensor) -> Tensor:
        signal = self.schedule.signal(level)[..., None, None]
        total = signal**2 * self.variance + self.schedule.noise(level)[..., None, None] ** 2
        residual = latents.unsqueeze(-2) - signal * self.means.to(latents.dtype)
        weights = (-(residual**2).sum(-1, keepdim=True) / (2 * total)).softmax(-2)
        centres = self.means.to(latents.dtype) + signal * self.variance / total * residual
        denoised = (weights * centres).sum(-2)
        return self.schedule.velocity_from_denoised(latents, denoised, level)


@dataclass(frozen=True)
class Spans:
    """Latents (B, N, D) with start and end levels, numbers or (B, N)."""

    latents: Tensor
    start: Any
    end: Any

    @property
    def frozen(self) -> Tensor:
        return self.start == self.end


@st.composite
def spans(
    draw: st.DrawFn, low: float = 0.0, high: float = 1.0, dim: int = 3, dtype: torch.dtype = torch.float64
) -> Spans:
    """Latents in (0.1, 0.9) and falling spans within [low, high]: the first is all of it, others touch an end or rest."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    latents = 0.1 + 0.8 * torch.rand(batch, tokens, dim, generator=generator, dtype=dtype)
    levels = low + (high - low) * torch.rand(2, batch, tokens, generator=generator, dtype=dtype)
    ends = torch.rand(2, batch, tokens, generator=generator) < 0.2
    start = torch.where(ends[0], high, levels.amax(0))
    end = torch.where(ends[1], low, levels.amin(0))
    end = torch.where(torch.rand(batch, tokens, generator=generator) < 0.3, start, end)
    start[0, 0], end[0, 0] = high, low
    latents[0, 0, 0] = 0.9  # where the error constant of no method vanishes, as it does at other values
    return Spans(latents, start, end)


def order_of(solver: Callable[[int], Solver], flow, exact: Tensor, problem: Spans, steps: Sequence[int]) -> float:
    """The order of convergence of `solver(steps)`: minus the slope of log error over log steps, by least squares."""
    errors = [
        (integrate(flow, problem.latents, problem.start, problem.end, solver=solver(count)).latents - exact).abs().max()
        for count in steps
    ]
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
