"""What makes autoregression and diffusion two readings of one curve, for a given schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evo.core.duality import (
    EnumeratedTokens,
    autoregressive_flow,
    diffusion_flow,
    gaussian_discrete_bound,
    proposition_1,
    split_bits,
)
from evo.schedules import Schedule, TimeChange
from evo.testing.errors import require, require_all, require_close
from evo.testing.schedules import in_float64, slope
from evo.testing.targets import GaussianMixture, uneven_gaussian


def check_duality(schedule: Schedule, *, tolerance: float = 1e-3) -> None:
    """Hold a schedule to the duality of autoregression and diffusion; works on a float64 copy on the CPU.

    The time change s(t) is strictly increasing and invertible. The diffusion flow in t and the autoregressive flow in s carry a
    Gaussian along its known curve, and trace one curve of a mixture within `tolerance`; its slope in s is −C·∇log p. Bits are
    conserved within 4 standard errors. The discrete-time bound of Gaussian data approaches the continuous one at rate 1/T.

    Raises PropertyError, naming the property, the level and the error.
    """
    schedule = in_float64(schedule)
    with torch.no_grad():
        _check_time_change(TimeChange(schedule))
        _check_gaussian_curve(schedule)
        _check_curves(schedule, tolerance)
        _check_bits(schedule)
        _check_discrete_bound(schedule)


def _check_time_change(change: TimeChange) -> None:
    level = torch.linspace(0, 1, 201, dtype=torch.float64) * change.t_max
    clock = change.s(level)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    require_close("s runs from 0 at level 0 to 1 at t_max", clock[[0, -1]], ends, 1e-12, level=level[[0, -1]])
    require_all("s increases strictly up to t_max", clock.diff() > 0, level=level[1:])
    inner = level[1:-1]
    require_close("d_s is the derivative of s", change.d_s(inner), slope(change.s, inner), 1e-6, level=inner)
    require_close("t(s) inverts s(t)", change.t(clock), level, 1e-7, level=level)
    beyond = torch.ones(1, dtype=torch.float64)
    require_close("s is 1 from t_max on", change.s(beyond), beyond, 1e-12)


def _check_gaussian_curve(schedule: Schedule) -> None:
    """Both flows of a Gaussian, held point by point against the curve itself, which is known."""
    gaussian, change = uneven_gaussian(schedule), TimeChange(schedule)
    level = torch.linspace(schedule.t_min, 0.99 * change.t_max, 200, dtype=torch.float64)[:, None]
    clock, at = change.s(level), level[..., None]
    top = torch.full_like(level, change.t_max)
    start = gaussian.sample(top, 2, torch.Generator().manual_seed(0))

    def curve(t: Tensor) -> Tensor:
        return gaussian.transport(start, top, t.squeeze(-1))

    velocity = diffusion_flow(schedule, gaussian.score)(curve(at), level)
    claim = "the diffusion flow is f·z − ½g²·∇log p, which carries a Gaussian along its curve"
    require_close(claim, velocity, slope(curve, at), 1e-6, level=at)

    def driftless(t: Tensor) -> Tensor:
        return curve(t) / schedule.signal(t)

    dy_ds = slope(driftless, at) / slope(change.s, at)
    claimed = autoregressive_flow(change, gaussian.score)(driftless(at), clock)
    # Both grow like 1/s towards data; per relative change of s they are of the size of y.
    claim = "the autoregressive flow is dy/ds = −C·∇log p, which carries a Gaussian along its curve"
    require_close(claim, claimed * clock[..., None], dy_ds * clock[..., None], 1e-5, level=at)


def _check_curves(schedule: Schedule, tolerance: float) -> None:
    mixture = GaussianMixture(
        schedule=schedule,
        weights=torch.tensor([0.5, 0.3, 0.2]).double(),
        means=torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5]]).double(),
        variances=torch.tensor([0.2, 0.3, 0.1]).double(),
    )
    top = torch.tensor(TimeChange(schedule).t_max, dtype=torch.float64)
    unit = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curves = proposition_1(schedule, mixture.score, schedule.noise(top) * unit, nodes=24)
    zero, level = torch.zeros_like(curves.gap), curves.levels
    claim = "the diffusion flow in t and the autoregressive flow in s trace one curve"
    require_close(claim, curves.gap, zero, tolerance, level=level)
    require_close("dy/ds is −C·∇log p along the diffusion flow", curves.slope_gap, zero, tolerance, level=level)


def _check_bits(schedule: Schedule) -> None:
    """H(X) of two correlated tokens, whatever the levels, also where they are chosen from what was drawn."""
    radius = math.sqrt(2 * math.log(3))
    angles = torch.tensor([0.0, 2.0, 4.2], dtype=torch.float64)
    tokens = EnumeratedTokens(
        schedule=schedule,
        probabilities=torch.tensor([[0.32, 0.01, 0.01], [0.01, 0.32, 0.01], [0.01, 0.01, 0.3]], dtype=torch.float64),
        embeddings=radius * torch.stack([angles.cos(), angles.sin()], dim=-1),
    )

    def by_confidence(latents: Tensor, levels: Tensor) -> Tensor:
        """The first token half-way; the second a word at once where the first is all but known, and pure noise elsewhere."""
        if levels.shape[1] == 0:
            return schedule.level_of_log_snr(torch.zeros_like(levels.sum(1)))
        belief = tokens.evidence(latents, levels)[:, 0].softmax(-1)
        return torch.where(belief.amax(-1) > 0.9, 0.0, 1.0).to(levels)

    fixed = {f"levels {levels}": torch.tensor(levels) for levels in ((0.6, 0.3), (1.0, 0.5))}
    for name, levels in {**fixed, "levels computed from the latents": by_confidence}.items():
        generator = torch.Generator().manual_seed(0)
        excess = split_bits(tokens, levels, generator=generator, sequences=4096, clock_values=12).excess
        held = abs(excess.mean) <= 4 * excess.standard_error + 1e-9
        found = f"the parts sum to {tokens.entropy:.4f} plus {excess} nats at {name}"
        require("bits are conserved: sketch + flow + reconstruction is H(X)", held, found)


def _check_discrete_bound(schedule: Schedule) -> None:
    coarse, fine = (gaussian_discrete_bound(schedule, 0.5, steps) for steps in (2**14, 2**15))
    claim = "the discrete bound approaches the continuous one from above at rate 1/T"
    ratio = coarse.gap / fine.gap
    found = f"the gap is {coarse.gap:.3e} with {coarse.steps} steps and {fine.gap:.3e} with {fine.steps}, a ratio of {ratio:.3f}"
    require(claim, fine.gap > 0 and abs(ratio - 2) < 0.05, found)
