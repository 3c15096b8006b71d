"""The variance exploding SDE with geometric noise (Song et al. 2021, Eq. 9 and App. C): the signal never fades."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import Schedule


class VarianceExploding(Schedule):
    """s = 1, n = σ₀·(σ₁/σ₀)ᵗ: no drift, log-SNR linear in t, nothing singular.

    Neither end is exact: noise σ₀ is left at 0, and signal at 1 (its SNR is σ₁⁻²).
    """

    variance_preserving = False

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, *, t_min: float = 0.1) -> None:
        """`sigma_min` > 0 is σ₀, the noise at level 0, and `sigma_max` > `sigma_min` is σ₁. ValueError otherwise."""
        super().__init__(t_min=t_min)
        if not 0 < sigma_min < sigma_max < float("inf"):
            raise ValueError(f"sigma_min = {sigma_min!r}, sigma_max = {sigma_max!r}: needs 0 < sigma_min < sigma_max.")
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self._rate = math.log(sigma_max / sigma_min)

    def signal(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def noise(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self._rate * t).exp()

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_min) + self._rate * t)

    def d_signal(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_noise(self, t: Tensor) -> Tensor:
        return self._rate * self.noise(t)

    def d_log_snr(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -2 * self._rate)

    def level_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((-log_snr / 2 - math.log(self.sigma_min)) / self._rate).clamp(0, 1)

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return math.sqrt(2 * self._rate) * self.noise(t)

    def scale(self, signal: Tensor, noise: Tensor) -> Tensor:
        return signal

    def config(self) -> dict[str, Any]:
        return super().config() | {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
