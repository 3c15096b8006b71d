"""The cosine schedule (Nichol and Dhariwal 2021, without their offset): the one of the paper, and the default."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Schedule
from .conversions import interior

HALF_PI = math.pi / 2


class Cosine(Schedule):
    """s = cos(πt/2), n = sin(πt/2): from exactly the word (s = 1, n = 0) to exactly noise (s = 0, n = 1)."""

    def signal(self, t: Tensor) -> Tensor:
        return (HALF_PI * (1 - t)).sin()  # cos(πt/2) leaves −4e-8 at t = 1 in float32

    def noise(self, t: Tensor) -> Tensor:
        return (HALF_PI * t).sin()

    def d_signal(self, t: Tensor) -> Tensor:
        return -HALF_PI * self.noise(t)

    def d_noise(self, t: Tensor) -> Tensor:
        return HALF_PI * self.signal(t)

    def log_snr(self, t: Tensor) -> Tensor:
        t = interior(t)
        return 2 * (self.signal(t).log() - self.noise(t).log())

    def d_log_snr(self, t: Tensor) -> Tensor:
        t = interior(t)
        return -math.pi / (self.signal(t) * self.noise(t))

    def level_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan((-log_snr / 2).exp()) / HALF_PI
