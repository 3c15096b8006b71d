"""The time change that turns the diffusion flow into an autoregressive one: paper Eq. 16–19, for the drift-free form.

In y = z/s the probability flow of any schedule has no drift, dy/dt = −½·(n²/s²)'·∇_y log p. Measured by
v(t) = n²/s² − n²(0)/s²(0), normalised to s(t) = v(t)/v(t_max), it is dy/ds = −C·∇_y log p with one constant C.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .base import Schedule

MIN_LOG_SNR = -14.0
"""Where the time change ends: n²/s² may be infinite at level 1, and at this log-SNR nothing is readable."""


class TimeChange:
    """The autoregressive time s(t) = v(min(t, t_max)) / v(t_max) of a schedule, v = n²/s² − n²(0)/s²(0).

    Strictly increasing and invertible on [0, t_max], 1 beyond. It is extremely uneven (cosine: s(0.9) = 3.3e-5): walk
    it on nodes s(t_k). For a schedule that trains, it is that of the parameters at construction: build it anew.
    """

    t_max: float
    """The level at which log-SNR is −14, or the last at which it is finite and above. It is a float32 number, so that
    s(t_max) = 1 in either precision."""
    constant: float
    """C = ½·v(t_max)."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        home = next(itertools.chain(schedule.parameters(), schedule.buffers()), torch.empty(0, device="cpu"))
        with torch.no_grad():
            ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=home.device)
            end = schedule.level_of_log_snr(schedule.log_snr(ends[1]).clamp(min=MIN_LOG_SNR)).float().double()
            self._v_start, v_end = self._ratio(torch.stack((ends[0], end))).tolist()
        self.t_max = float(end)
        self.constant = (v_end - self._v_start) / 2

    def s(self, t: Tensor) -> Tensor:
        """The autoregressive time in [0, 1] of the levels `t`, of their shape and dtype."""
        return (self._ratio(t.clamp(max=self.t_max)) - self._v_start) / (2 * self.constant)

    def d_s(self, t: Tensor) -> Tensor:
        """The derivative ds/dt = −(n²/s²)·d_log_snr / v(t_max); 0 beyond t_max."""
        inside = t.clamp(max=self.t_max)
        rate = -self._ratio(inside) * self.schedule.d_log_snr(inside) / (2 * self.constant)
        return torch.where(t > self.t_max, 0.0, rate)

    def t(self, s: Tensor) -> Tensor:
        """The level in [0, t_max] at which s(t) = `s` in [0, 1]."""
        return self.schedule.level_of_log_snr(-(2 * self.constant * s + self._v_start).log()).clamp(max=self.t_max)

    def __repr__(self) -> str:
        return f"TimeChange({self.schedule}, t_max={self.t_max:.5f}, constant={self.constant:.5g})"

    def _ratio(self, t: Tensor) -> Tensor:
        """n²/s²: from signal and noise, which are exact at 0 where log_snr is not."""
        return (self.schedule.noise(t) / self.schedule.signal(t)).square()
