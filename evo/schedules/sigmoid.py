"""The sigmoid schedule (Jabri et al. 2022; Chen 2023): a stretch of the logistic curve as ᾱ."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .base import Schedule
from .conversions import interior, root


class Sigmoid(Schedule):
    """ᾱ = (σ(b) − σ(x)) / (σ(b) − σ(a)), x = a + t·(b − a), σ the logistic function.

    Exactly the word at 0 and exactly noise at 1, whatever part [a, b] of the logistic curve is used. ᾱ and 1 − ᾱ are
    computed from σ(y) − σ(x) = σ(y)·σ(−x)·(1 − e^(x−y)), which does not cancel where the two are close.
    """

    def __init__(self, start: float = -3.0, end: float = 3.0, *, t_min: float = 0.1) -> None:
        """`start` < `end` are a and b; the temperature τ of the paper divides both. ValueError otherwise."""
        super().__init__(t_min=t_min)
        if not -float("inf") < start < end < float("inf"):
            raise ValueError(f"start = {start!r}, end = {end!r}: needs finite start < end.")
        self.start, self.end = float(start), float(end)
        # σ at both ends and its complement, each without cancellation.
        self._up = tuple(1 / (1 + math.exp(-x)) for x in (start, end))
        self._down = tuple(1 / (1 + math.exp(x)) for x in (start, end))

    def _gaps(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(σ(b) − σ(x), σ(x) − σ(a)): signal and noise power, up to one factor."""
        length = self.end - self.start
        x = self.start + length * t
        above = -torch.expm1(-length * (1 - t)) * (-x).sigmoid() * self._up[1]
        return above, -torch.expm1(-length * t) * x.sigmoid() * self._down[0]

    def signal(self, t: Tensor) -> Tensor:
        above, below = self._gaps(t)
        return root(above / (above + below))

    def noise(self, t: Tensor) -> Tensor:
        above, below = self._gaps(t)
        return root(below / (above + below))

    def log_snr(self, t: Tensor) -> Tensor:
        above, below = self._gaps(interior(t))
        return above.log() - below.log()

    def d_log_snr(self, t: Tensor) -> Tensor:
        t, length = interior(t), self.end - self.start
        return -length * (1 + 1 / torch.expm1(length * t) + 1 / torch.expm1(length * (1 - t)))

    def level_of_log_snr(self, log_snr: Tensor) -> Tensor:
        # x − a = log σ(x)/σ(a) − log σ(−x)/σ(−a), where σ(x) = ᾱ·σ(a) + (1 − ᾱ)·σ(b) and so for −x.
        alpha, rest = nn.functional.logsigmoid(log_snr), nn.functional.logsigmoid(-log_snr)
        up = torch.logaddexp(alpha, rest + math.log(self._up[1] / self._up[0]))
        down = torch.logaddexp(alpha, rest + math.log(self._down[1] / self._down[0]))
        return ((up - down) / (self.end - self.start)).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        return super().config() | {"start": self.start, "end": self.end}
