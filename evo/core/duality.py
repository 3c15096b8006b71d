"""Autoregression and diffusion as one curve: the two flows of a score, and how far apart they run.

A schedule z = s·x + n·ε has the probability flow (Song et al. 2021, Eq. 13; the paper's Eq. 14 with its sign and ½ put right)

    dz/dt = f(t)·z − ½·g(t)²·∇log p_t(z).

In y = z/s the drift is gone. With s(t) = v(t)/v(t_max), v = n²/s² − n²(0)/s²(0) and C = ½·v(t_max) the flow is the paper's Eq. 18
in the autoregressive clock s,

    dy/ds = −C·∇_y log p_s(y).

The clock counts noise: data is s = 0, and text is written from s = 1 down. Autoregressive progress is 1 − s.

B sequences, N tokens, D latent dimensions, K + 1 nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evo.core.duality_bits import (
    BitSplit,
    ConservedBits,
    EnumeratedTokens,
    Estimate,
    LevelRule,
    split_bits,
    split_model_bits,
)
from evo.core.duality_bound import DiscreteBound, gaussian_discrete_bound
from evo.schedules import Schedule, TimeChange
from evo.solvers import RK4, Field, Solver, integrate

__all__ = [
    "BitSplit",
    "ConservedBits",
    "CurveGap",
    "DiscreteBound",
    "EnumeratedTokens",
    "Estimate",
    "LevelRule",
    "Score",
    "autoregressive_flow",
    "diffusion_flow",
    "gaussian_discrete_bound",
    "proposition_1",
    "split_bits",
    "split_model_bits",
]

Score = Field
"""`score(latents (B, N, D), level (B, N))` is ∇_z log p at that level, (B, N, D)."""


def diffusion_flow(schedule: Schedule, score: Score) -> Field:
    """The probability flow of a score: dz/dt as a field of (latents (B, N, D), level (B, N))."""

    def field(latents: Tensor, level: Tensor) -> Tensor:
        drift, diffusion = schedule.drift(level)[..., None], schedule.diffusion(level)[..., None]
        return drift * latents - 0.5 * diffusion**2 * score(latents, level)

    return field


def autoregressive_flow(change: TimeChange, score: Score) -> Field:
    """The same flow in y = z/s: dy/ds as a field of (y (B, N, D), clock (B, N)), the clock being s(t) of `change`."""

    def field(driftless: Tensor, clock: Tensor) -> Tensor:
        level = change.t(clock)
        signal = change.schedule.signal(level)[..., None]
        return -change.constant * signal * score(signal * driftless, level)  # ∇_y log p = s·∇_z log p

    return field


@dataclass(frozen=True, kw_only=True)
class CurveGap:
    """One curve walked twice from noise to data, and the distance between the two walks.

    Distances are in units of √(1 + n²/s²), the spread of y where data has unit variance.

    Attributes:
        levels, clock: the nodes (K+1,) in t, falling, and in s.
        diffusion: y at the nodes, (K+1, B, N, D), walked in t.
        autoregressive: y at the nodes, (K+1, B, N, D), walked in s.
        gap: the largest distance between the curves at each node, (K+1,).
        slope_gap: the largest |dy/ds + C·∇_y log p|·s along the diffusion curve, (K+1,): by how much Eq. 18 fails per relative
            change of s.
    """

    levels: Tensor
    clock: Tensor
    diffusion: Tensor
    autoregressive: Tensor
    gap: Tensor
    slope_gap: Tensor

    @property
    def largest(self) -> float:
        """The largest distance at any node."""
        return self.gap.max().item()


@torch.no_grad()
def proposition_1(
    schedule: Schedule,
    score: Score,
    latents: Tensor,
    *,
    start: float | None = None,
    end: float | None = None,
    nodes: int = 48,
    solver: Solver | None = None,
) -> CurveGap:
    """Walk both flows from `latents` (B, N, D) at level `start` to level `end`, and measure how far apart they run.

    The walks share nothing but the score: one uses the schedule's drift and diffusion, the other `TimeChange`. What is left
    between them is the error of `solver`, which takes its steps between each two nodes. Nodes are even in log-SNR, because s is
    not (cosine: s(.9) = 3e-5). Use float64: along the curve s spans seven orders of magnitude.

    Args:
        start: None is t_max, or 1 − 1e-4 where that is less: beyond, schedules hold their singular coefficients constant.
        end: None is `schedule.t_min`.
        nodes: K.
        solver: None is `RK4(steps=4)`.

    Raises:
        ValueError: for levels that do not fall, or lie outside.
    """
    change, solver = TimeChange(schedule), solver or RK4(steps=4)
    top = min(change.t_max, 1 - 1e-4)
    start, end = top if start is None else start, schedule.t_min if end is None else end
    if not 0 < end < start <= top:
        raise ValueError(f"the walk goes down, 0 < end < start <= {top}, got start {start} and end {end}")
    first, last = schedule.log_snr(latents.new_tensor([start, end])).tolist()
    fraction = torch.linspace(0, 1, nodes + 1, dtype=latents.dtype, device=latents.device)
    levels = schedule.level_of_log_snr(first + fraction * (last - first))
    levels[0], levels[-1] = start, end
    clock, signal = change.s(levels), schedule.signal(levels)

    in_t, in_s = [latents], [latents / signal[0]]
    diffusion, autoregressive = diffusion_flow(schedule, score), autoregressive_flow(change, score)
    for k in range(nodes):
        in_t.append(integrate(diffusion, in_t[-1], levels[k].item(), levels[k + 1].item(), solver=solver).latents)
        in_s.append(integrate(autoregressive, in_s[-1], clock[k].item(), clock[k + 1].item(), solver=solver).latents)
    z, y = torch.stack(in_t), torch.stack(in_s)

    def per_node(values: Tensor) -> Tensor:
        return values[:, None, None, None]

    def along(field: Field, points: Tensor, nodes: Tensor) -> Tensor:
        level = per_node(nodes)[..., 0].expand(points.shape[:-1])
        return field(points.flatten(0, 1), level.flatten(0, 1)).view(points.shape)

    def largest(difference: Tensor) -> Tensor:
        return difference.abs().flatten(1).amax(1) / (1 + 1 / schedule.snr(levels)).sqrt()

    dz_dt, d_signal = along(diffusion, z, levels), per_node(schedule.d_signal(levels))
    walked, dy_dt = z / per_node(signal), (dz_dt - d_signal / per_node(signal) * z) / per_node(signal)
    dy_ds, claimed = dy_dt / per_node(change.d_s(levels)), along(autoregressive, walked, clock)
    return CurveGap(
        levels=levels,
        clock=clock,
        diffusion=walked,
        autoregressive=y,
        gap=largest(walked - y),
        slope_gap=largest((dy_ds - claimed) * per_node(clock)),
    )
