"""The second-order exponential multistep method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import FixedStep
from .exponential import coefficients
from .protocols import Field, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class ExponentialMultistep(FixedStep):
    """Second order, one evaluation a step: `Exponential` with x̂ extrapolated to the middle of the step.

    The flow is d(z/n) = x̂·d(s/n). Taking x̂ at the middle of the step, from its values here and one step ago, and s/n
    exactly is DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); where it puts the middle half-way in λ = log(s/n), here
    it lies half-way in the angle ψ = arctan(s/n). The two agree to second order inside (0, 1), but λ is infinite at
    both ends, and a solve from pure noise loses order to it; ψ runs from 0 to π/2 and is linear in t on the cosine
    schedule.

    Steps may change length from one to the next. Second order is lost where there is no step before: the first step of
    a token, also after it has waited, is DDIM, with a local error of h². Once per solve that costs nothing in the
    order; forgetting the state at every step makes it first order. It is also lost in a step that ends at noise 0,
    where x̂ should be taken at the step's end: on a target with a density the order from level 1 to 0 is 1.5 to 1.8
    where noise begins linearly in t, and 1 to 1.4 where it begins as √t.

    The field must be a probability flow of `schedule`.
    """

    order = 2
    schedule: NoiseSchedule

    def step(
        self,
        field: Field,
        latents: Tensor,
        level: Tensor,
        next_level: Tensor,
        state: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One step. The state is x̂ (B, N, D) and the angle (B, N, 1) covered by the step that began there."""
        denoised, noise = self.schedule.split_velocity(latents, field(latents, level), level)
        (s, n), (s_next, n_next) = coefficients(self.schedule, level), coefficients(self.schedule, next_level)
        angle = torch.atan2(s_next, n_next) - torch.atan2(s, n)
        stepped = s_next * denoised + n_next * noise
        if state is not None:
            previous, previous_angle = state
            moved = previous_angle != 0
            ratio = torch.where(moved, angle / torch.where(moved, previous_angle, 1.0), 0.0)
            # n'·(s'/n' − s/n), the weight of x̂ in z' = (n'/n)·z + n'·x̂·Δ(s/n); 0 for a token that stays at noise 0
            weight = (s_next * n - s * n_next) / n.clamp(min=torch.finfo(n.dtype).eps)
            stepped = stepped + weight * ratio / 2 * (denoised - previous)
        return stepped, (denoised, angle)
