"""The straight line between word and noise (Liu et al. 2023; Lipman et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Schedule
from .conversions import interior


class RectifiedFlow(Schedule):
    """s = 1 − t, n = t: exactly the word at 0, exactly noise at 1; the velocity is ε̂ − x̂ at every level."""

    variance_preserving = False

    def signal(self, t: Tensor) -> Tensor:
        return 1 - t

    def noise(self, t: Tensor) -> Tensor:
        return t.clone()

    def log_snr(self, t: Tensor) -> Tensor:
        t = interior(t)
        return 2 * (torch.log1p(-t) - t.log())

    def d_signal(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1)

    def d_noise(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_log_snr(self, t: Tensor) -> Tensor:
        t = interior(t)
        return -2 / (t * (1 - t))

    def level_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).sigmoid()

    def scale(self, signal: Tensor, noise: Tensor) -> Tensor:
        return signal + noise
