"""The variance preserving SDE with linear β (Ho et al. 2020; continuous form: Song et al. 2021, Eq. 11, App. C)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Schedule
from .conversions import interior, root


class LinearVP(Schedule):
    """dz = −½β z dt + √β dw with β(t) = β₀ + t·(β₁ − β₀); s = exp(−½B), n = √(1 − s²), B(t) = ∫₀ᵗ β.

    Exactly the word at 0. At 1 some signal is left: s = exp(−¼(β₀ + β₁)), 0.0066 by default.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, *, t_min: float = 0.1) -> None:
        """`beta_min` > 0 is β₀ and `beta_max` ≥ `beta_min` is β₁. ValueError otherwise."""
        super().__init__(t_min=t_min)
        if not 0 < beta_min <= beta_max < float("inf"):
            raise ValueError(f"beta_min = {beta_min!r}, beta_max = {beta_max!r}: needs 0 < beta_min <= beta_max.")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + (self.beta_max - self.beta_min) / 2 * t)

    def signal(self, t: Tensor) -> Tensor:
        return (-self._integral(t) / 2).exp()

    def noise(self, t: Tensor) -> Tensor:
        return root(-torch.expm1(-self._integral(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        integral = self._integral(interior(t))
        return -integral - (-torch.expm1(-integral)).log()

    def d_signal(self, t: Tensor) -> Tensor:
        return -self._beta(t) * self.signal(t) / 2

    def d_noise(self, t: Tensor) -> Tensor:
        t = interior(t)
        return self._beta(t) * self.signal(t).square() / (2 * self.noise(t))

    def d_log_snr(self, t: Tensor) -> Tensor:
        t = interior(t)
        return -self._beta(t) / self.noise(t).square()

    def level_of_log_snr(self, log_snr: Tensor) -> Tensor:
        integral = torch.logaddexp(-log_snr, torch.zeros_like(log_snr)).clamp(max=(self.beta_min + self.beta_max) / 2)
        # The positive root of _integral(t) = integral, in the form that does not cancel.
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral).sqrt()
        return (2 * integral / (self.beta_min + root)).clamp(max=1)

    def drift(self, t: Tensor) -> Tensor:
        return -self._beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        return self._beta(t).sqrt()

    def config(self) -> dict[str, Any]:
        return super().config() | {"beta_min": self.beta_min, "beta_max": self.beta_max}
