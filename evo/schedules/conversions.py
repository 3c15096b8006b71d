"""One latent, four descriptions: the denoised latent x̂, the noise ε̂, the score and the velocity.

With z = s·x̂ + n·ε̂ at a level (s the signal, n the noise, a prime the derivative in the level):

    score = ∇_z log p = −ε̂ / n          velocity = dz/dlevel = s'·x̂ + n'·ε̂

Latents are (..., D); a level has their shape without the last axis, so that every token is at a level of its own.
Each conversion undoes its partner on [1e-4, 1 − 1e-4]. Beyond, where n or s may be 0, what a conversion divides by is
taken at the nearer end of that interval, and that alone: results are finite, and a remainder z − s·x̂ or z − n·ε̂ that
vanishes with its divisor stays 0. So the velocity of a realised token, z = x̂ at level 0, is s'·x̂: the limit of the flow
wherever n' is finite there. Where n grows as √t (`LinearVP`, `Sigmoid`) that limit has a further term, −½·(n²)'·score,
of which x̂ at level 0 says nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

EDGE = 1e-4
"""Distance from the ends of [0, 1] within which singular quantities keep their value at that distance."""


def interior(level: Tensor) -> Tensor:
    """`level` clamped to [1e-4, 1 − 1e-4], where every quantity of a schedule is finite."""
    return level.clamp(EDGE, 1 - EDGE)


def root(power: Tensor) -> Tensor:
    """√power with gradient 0 where it is 0, at the ends, instead of an infinite one that makes NaN of whatever it meets."""
    positive = power > 0
    return torch.where(positive, power.where(positive, 1.0).sqrt(), 0.0)


class Conversions(ABC):
    """The conversions that signal, noise and their derivatives define; `Schedule` inherits them."""

    @abstractmethod
    def signal(self, t: Tensor) -> Tensor:
        """s(t), the factor of the clean latent."""

    @abstractmethod
    def noise(self, t: Tensor) -> Tensor:
        """n(t), the factor of the unit noise."""

    @abstractmethod
    def d_signal(self, t: Tensor) -> Tensor:
        """The derivative ds/dt."""

    @abstractmethod
    def d_noise(self, t: Tensor) -> Tensor:
        """The derivative dn/dt."""

    def noised(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The latent z = s·clean + n·noise. `clean` and `noise` (..., D), `level` (...) → (..., D)."""
        return self.signal(level).unsqueeze(-1) * clean + self.noise(level).unsqueeze(-1) * noise

    def noise_from_denoised(self, latents: Tensor, denoised: Tensor, level: Tensor) -> Tensor:
        """The noise ε̂ = (z − s·x̂) / n. `latents` and `denoised` (..., D), `level` (...) → (..., D)."""
        rest = latents - self.signal(level).unsqueeze(-1) * denoised
        return rest / self.noise(level.clamp(min=EDGE)).unsqueeze(-1)

    def denoised_from_noise(self, latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The denoised latent x̂ = (z − n·ε̂) / s. `latents` and `noise` (..., D), `level` (...) → (..., D)."""
        rest = latents - self.noise(level).unsqueeze(-1) * noise
        return rest / self.signal(level.clamp(max=1 - EDGE)).unsqueeze(-1)

    def score_from_noise(self, noise: Tensor, level: Tensor) -> Tensor:
        """The score ∇ log p = −ε̂ / n. `noise` (..., D), `level` (...) → (..., D)."""
        return -noise / self.noise(level.clamp(min=EDGE)).unsqueeze(-1)

    def noise_from_score(self, score: Tensor, level: Tensor) -> Tensor:
        """The noise ε̂ = −n·∇ log p. `score` (..., D), `level` (...) → (..., D)."""
        return -self.noise(level.clamp(min=EDGE)).unsqueeze(-1) * score

    def velocity(self, denoised: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The velocity dz/dlevel = s'·x̂ + n'·ε̂. `denoised` and `noise` (..., D), `level` (...) → (..., D)."""
        return self.d_signal(level).unsqueeze(-1) * denoised + self.d_noise(level).unsqueeze(-1) * noise

    def velocity_from_denoised(self, latents: Tensor, denoised: Tensor, level: Tensor) -> Tensor:
        """The velocity at `latents` when their denoised latent is known. Both (..., D), `level` (...) → (..., D)."""
        return self.velocity(denoised, self.noise_from_denoised(latents, denoised, level), level)

    def split_velocity(self, latents: Tensor, velocity: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂, ε̂), each (..., D): the solution of z = s·x̂ + n·ε̂, F = s'·x̂ + n'·ε̂.

        Its determinant s·n' − s'·n = −½·s·n·d_log_snr is positive on (0, 1); on every schedule of this library it is
        positive at both ends too. `latents` and `velocity` (..., D), `level` (...).
        """
        signal, noise = self.signal(level).unsqueeze(-1), self.noise(level).unsqueeze(-1)
        d_signal, d_noise = self.d_signal(level).unsqueeze(-1), self.d_noise(level).unsqueeze(-1)
        determinant = signal * d_noise - d_signal * noise
        denoised = (d_noise * latents - noise * velocity) / determinant
        return denoised, (signal * velocity - d_signal * latents) / determinant

    def bridge(self, noise: Tensor, level: Tensor, new_level: Tensor, fresh: Tensor) -> Tensor:
        """The noise at `new_level` ≤ `level` of the latent whose noise at `level` is `noise`.

        ρ·noise + √(1 − ρ²)·fresh, ρ² = SNR(level) / SNR(new_level): between its levels one latent is a Brownian motion,
        z/s = e + w(n²/s²). ρ is 0 where SNR(level) = 0 and 1 where the levels are equal. `noise` and `fresh` (..., D),
        levels (...) → (..., D). ρ carries no gradient: its derivative is infinite at ρ = 1.
        """
        with torch.no_grad():
            kept = self.signal(level) * self.noise(new_level) / (self.noise(level) * self.signal(new_level))
            kept = torch.where(level == new_level, 1.0, kept).clamp(max=1.0).unsqueeze(-1)
            drawn = ((1 - kept) * (1 + kept)).sqrt()
        return kept * noise + drawn * fresh
