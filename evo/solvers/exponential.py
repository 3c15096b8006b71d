"""The exponential Euler method of diffusion flows: exact in their linear part."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import FixedStep
from .protocols import Field, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class Exponential(FixedStep):
    """First order, one evaluation a step, and exact wherever x̂ stays as it is along the step.

    The velocity is split into the denoised latents and the noise that it is made of, and these are put together at the
    next level, z ← s(τ')·x̂ + n(τ')·ε̂: the DDIM update (Song et al. 2021, eq. 12 with σ = 0), also known as
    DPM-Solver-1 (Lu et al. 2022).

    The field must be a probability flow of `schedule`.
    """

    order = 1
    schedule: NoiseSchedule

    def step(
        self, field: Field, latents: Tensor, level: Tensor, next_level: Tensor, state: None
    ) -> tuple[Tensor, None]:
        """One DDIM update."""
        denoised, noise = self.schedule.split_velocity(latents, field(latents, level), level)
        s_next, n_next = coefficients(self.schedule, next_level)
        return s_next * denoised + n_next * noise, None


def coefficients(schedule: NoiseSchedule, level: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise at `level` (B, N), as (B, N, 1), ready to multiply latents."""
    return schedule.signal(level).unsqueeze(-1), schedule.noise(level).unsqueeze(-1)
