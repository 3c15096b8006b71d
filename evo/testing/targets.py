"""Distributions of latents whose score, denoiser and flow are known exactly, under any schedule.

Each is a frozen object with `score(latents, level)` and `denoised(latents, level)`, latents (B, N, D) and level (B, N). Those of
`Gaussian` and `GaussianMixture` are written from `schedule.signal` and `.noise` alone, so that everything else a schedule says of
itself can be held against them; their `velocity` is a field for `evo.solvers.integrate`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evo.core.duality import EnumeratedTokens
from evo.schedules import Schedule

__all__ = ["EnumeratedTokens", "Gaussian", "GaussianMixture"]


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """x ~ N(mean, variance), every dimension on its own; mean and variance are scalars or (D,)."""

    schedule: Schedule
    mean: Tensor
    variance: Tensor

    def moments(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of z at `level` (B, N): both (B, N, D) or (B, N, 1)."""
        signal, noise = self.schedule.signal(level)[..., None], self.schedule.noise(level)[..., None]
        return signal * self.mean, signal**2 * self.variance + noise**2

    def score(self, latents: Tensor, level: Tensor) -> Tensor:
        """∇ log p(z) = −(z − mean)/variance, of the noised distribution."""
        mean, variance = self.moments(level)
        return -(latents - mean) / variance

    def denoised(self, latents: Tensor, level: Tensor) -> Tensor:
        """E[x | z], by Bayes' rule for Gaussians."""
        mean, variance = self.moments(level)
        signal = self.schedule.signal(level)[..., None]
        return self.mean + signal * self.variance / variance * (latents - mean)

    def velocity(self, latents: Tensor, level: Tensor) -> Tensor:
        """dz/dt of the probability flow."""
        return self.schedule.velocity_from_denoised(latents, self.denoised(latents, level), level)

    def transport(self, latents: Tensor, level: Tensor, new_level: Tensor) -> Tensor:
        """The exact flow from one level to another: standardised coordinates stay what they are."""
        (mean, variance), (new_mean, new_variance) = self.moments(level), self.moments(new_level)
        return new_mean + (new_variance / variance).sqrt() * (latents - mean)

    def sample(self, level: Tensor, dim: int, generator: torch.Generator) -> Tensor:
        """Latents (B, N, dim) of the noised distribution at `level` (B, N)."""
        mean, variance = self.moments(level)
        shape = (*level.shape, dim)
        return mean + variance.sqrt() * torch.randn(shape, dtype=level.dtype, device=level.device, generator=generator)


def uneven_gaussian(schedule: Schedule) -> Gaussian:
    """The Gaussian that the checks use: two dimensions, off the centre, of different variances."""
    mean, variance = torch.tensor([[0.5, -1.0], [0.3, 0.1]], dtype=torch.float64)
    return Gaussian(schedule=schedule, mean=mean, variance=variance)


@dataclass(frozen=True, kw_only=True)
class GaussianMixture:
    """x ~ Σ_k weights_k·N(means_k, variances_k·I): weights and variances (K,), means (K, D)."""

    schedule: Schedule
    weights: Tensor
    means: Tensor
    variances: Tensor

    def _components(self, latents: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets z − s·means (B, N, K, D), noised variances (B, N, K, 1) and responsibilities (B, N, K, 1)."""
        signal, noise = self.schedule.signal(level)[..., None, None], self.schedule.noise(level)[..., None, None]
        offset = latents[..., None, :] - signal * self.means
        variance = signal**2 * self.variances[:, None] + noise**2
        log_density = -0.5 * (offset.square() / variance + variance.log()).sum(-1, keepdim=True)
        return offset, variance, (self.weights.log()[:, None] + log_density).softmax(-2)

    def score(self, latents: Tensor, level: Tensor) -> Tensor:
        """∇ log p(z): the components' scores, weighted by their responsibilities."""
        offset, variance, share = self._components(latents, level)
        return -(share * offset / variance).sum(-2)

    def denoised(self, latents: Tensor, level: Tensor) -> Tensor:
        """E[x | z]: the components' posterior means, weighted by their responsibilities."""
        offset, variance, share = self._components(latents, level)
        signal = self.schedule.signal(level)[..., None, None]
        return (share * (self.means + signal * self.variances[:, None] / variance * offset)).sum(-2)

    def velocity(self, latents: Tensor, level: Tensor) -> Tensor:
        """dz/dt of the probability flow."""
        return self.schedule.velocity_from_denoised(latents, self.denoised(latents, level), level)
