"""The discrete-time bound of Gaussian data under its ideal denoiser, in closed form.

For x ~ N(μ, σ²) the ideal denoiser errs by σ²/(1 + σ²·SNR), and the terms of a bound of T steps (Kingma et al. 2021, with x̂ in
the place of x in q(z_{k+1} | z_k, x)) are

    KL( q(z_{k+1} | z_k, x) ‖ q(z_{k+1} | z_k, x̂) ) = ½·(SNR_{k+1} − SNR_k)·σ²/(1 + σ²·SNR_k).

They are a Riemann sum of the flow bits ½·ln((1 + σ²·SNR_T)/(1 + σ²·SNR_0)). Their sum does not vanish as T grows, as the paper's
Eq. 8 has it: it approaches the flow bits from above, and what vanishes, at rate 1/T, is the difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evo.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class DiscreteBound:
    """Flow bits of Gaussian data in nats, summed over dimensions.

    Attributes:
        steps: T.
        discrete: the sum of the T transition terms.
        continuous: its limit, the I-MMSE integral.
    """

    steps: int
    discrete: float
    continuous: float

    @property
    def gap(self) -> float:
        """What T steps cost over infinitely many: positive, and proportional to 1/T for large T."""
        return self.discrete - self.continuous


@torch.no_grad()
def gaussian_discrete_bound(
    schedule: Schedule, variance: Tensor | float, steps: int, *, start: float = 1.0, end: float | None = None
) -> DiscreteBound:
    """The bound of N(·, variance) in `steps` even steps of level from `start` to `end` (None: t_min), in float64.

    `variance` is one number or one per dimension, (D,). Raises ValueError for no steps, or levels that do not fall.
    """
    end = schedule.t_min if end is None else end
    if steps < 1 or not 0 < end < start <= 1:
        raise ValueError(f"needs steps >= 1 and 0 < end < start <= 1, got steps {steps}, start {start}, end {end}")
    variance = torch.as_tensor(variance, dtype=torch.float64)[..., None]
    snr = schedule.snr(torch.linspace(start, end, steps + 1, dtype=torch.float64, device=variance.device))
    discrete = 0.5 * (snr.diff() * variance / (1 + variance * snr[:-1])).sum()
    continuous = 0.5 * ((variance * snr[-1]).log1p() - (variance * snr[0]).log1p()).sum()
    return DiscreteBound(steps=steps, discrete=discrete.item(), continuous=continuous.item())
