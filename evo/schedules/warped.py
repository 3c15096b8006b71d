"""The cosine schedule walked at another speed: the common ground of `Learned` and `InformationUniform`."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from .base import Schedule, bisect
from .conversions import interior
from .cosine import HALF_PI


class WarpedCosine(Schedule):
    """s = cos(πu/2), n = sin(πu/2) with u(t) strictly increasing from exactly 0 to exactly 1.

    du/dt is proportional to a quadratic B-spline on M equal intervals with positive coefficients, so that u is a cubic
    in each, twice continuously differentiable and strictly increasing. Both ends are exact, whatever the coefficients.
    """

    @abstractmethod
    def coefficients(self) -> Tensor:
        """Positive coefficients (M + 2,) of du/dt; the k-th is centred on the level (k − ½)/M. Any common factor."""

    def signal(self, t: Tensor) -> Tensor:
        u, _ = self._warp(t)
        return (HALF_PI * (1 - u)).sin()

    def noise(self, t: Tensor) -> Tensor:
        u, _ = self._warp(t)
        return (HALF_PI * u).sin()

    def d_signal(self, t: Tensor) -> Tensor:
        u, rate = self._warp(t)
        return -HALF_PI * rate * (HALF_PI * u).sin()

    def d_noise(self, t: Tensor) -> Tensor:
        u, rate = self._warp(t)
        return HALF_PI * rate * (HALF_PI * (1 - u)).sin()

    def log_snr(self, t: Tensor) -> Tensor:
        u, _ = self._warp(interior(t))
        return 2 * ((HALF_PI * (1 - u)).sin().log() - (HALF_PI * u).sin().log())

    def d_log_snr(self, t: Tensor) -> Tensor:
        u, rate = self._warp(interior(t))
        return -math.pi * rate / ((HALF_PI * (1 - u)).sin() * (HALF_PI * u).sin())

    def level_of_log_snr(self, log_snr: Tensor) -> Tensor:
        u = torch.atan((-log_snr / 2).exp()) / HALF_PI
        knots, spline = self._table(u)
        intervals = len(knots) - 1
        left = torch.searchsorted(knots.detach(), u.detach().contiguous(), right=True).sub(1).clamp(0, intervals - 1)
        around, area = [spline[left + i] for i in range(3)], (u - knots[left]) * intervals
        x = bisect(lambda x: _area(x, *around) < area, u)
        # A last Newton step: by its derivatives those of the inverse follow.
        x = x + (area - _area(x, *around)) / _height(x, *around)
        return ((left + x) / intervals).clamp(0, 1)

    def _table(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Values of u at the levels k/M (M + 1,), the last exactly 1, and coefficients (M + 2,), in `like`'s dtype."""
        spline = self.coefficients()
        spline = spline.to(torch.promote_types(spline.dtype, like.dtype))
        areas = (spline[:-2] + 4 * spline[1:-1] + spline[2:]) / (6 * (len(spline) - 2))
        knots = torch.cat((areas.new_zeros(1), areas.cumsum(0)))
        return (knots / knots[-1]).to(like.dtype), (spline / knots[-1]).to(like.dtype)

    def _warp(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The place u(t) on the cosine schedule and the rate du/dt."""
        knots, spline = self._table(t)
        intervals = len(knots) - 1
        left = (t.detach() * intervals).floor().long().clamp(0, intervals - 1)
        before, here, after = (spline[left + i] for i in range(3))
        x = t * intervals - left
        # Measured from the nearer knot, so that u is exact at both ends.
        up = _area(x, before, here, after) / intervals
        down = _area(1 - x, after, here, before) / intervals
        return torch.where(x < 0.5, knots[left] + up, knots[left + 1] - down), _height(x, before, here, after)


def _height(x: Tensor, before: Tensor, here: Tensor, after: Tensor) -> Tensor:
    """A quadratic B-spline at x in [0, 1] of an interval, from the three coefficients that reach it."""
    return ((1 - x).square() * before + (1 + 2 * x * (1 - x)) * here + x.square() * after) / 2


def _area(x: Tensor, before: Tensor, here: Tensor, after: Tensor) -> Tensor:
    """The integral of `_height` from 0 to x."""
    rising, rest = x**3 / 3, x * (1 - x + x.square() / 3)  # rest = (1 − (1 − x)³) / 3
    return (rest * before + (x + x.square() - 2 * rising) * here + rising * after) / 2
