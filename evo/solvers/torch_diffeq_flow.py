"""The vector field as torchdiffeq sees it: a slope on one clock, and an eye on the steps that are taken."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .contract import Problem, Velocity
from .record import Record
from .solution import SolverError
from .torch_diffeq_norm import TokenNorm


class Ended(SolverError):
    """Leaves torchdiffeq in the middle of a solve. The record knows how far it came and what failed, if anything."""


class Flow:
    """dz/du = (end − start)·F(z, τ(u)).

    With `check_slopes` every slope is looked at, for methods that let nobody see their steps.
    """

    def __init__(self, problem: Problem, *, check_slopes: bool = False) -> None:
        self.problem = problem
        self.check_slopes = check_slopes
        self.record = Record(problem)
        self.velocity = Velocity(problem)
        self.span = (problem.end - problem.start).unsqueeze(-1)

    def __call__(self, clock: Tensor, latents: Tensor) -> Tensor:
        """The slope (B, N, D) at `clock`, a 0-dim tensor in the dtype of `latents`."""
        # Where the field is slow, an adaptive method tries its first step far beyond the end.
        level = self.problem.level(clock.clamp(0, 1))
        slope = self.velocity(latents, level) * self.span
        if self.check_slopes and (lost := self.problem.lost(slope)).any():
            self.fail(lost, level, "the field gave NaN or infinity")
        return slope

    def fail(self, lost: Tensor, level: Tensor, reason: str) -> NoReturn:
        """End the solve for `reason`, which befell the tokens `lost` at `level`, both (B, N)."""
        self.record.failed_at = torch.where(lost, level.detach(), float("nan"))
        self.record.reason = reason
        raise Ended(reason)

    def fail_all(self, reason: str) -> NoReturn:
        """End the solve for a reason that no token can be blamed for."""
        live = self.problem.live
        self.fail(
            torch.ones_like(self.span[..., 0], dtype=torch.bool) if live is None else live, self.record.level, reason
        )


class ObservedFlow(Flow):
    """A flow that follows the steps of a method: for callbacks and trajectories, and for words when a step fails.

    torchdiffeq calls `callback_step` before a step, and again before every smaller one that it tries instead.
    `norm` is that of an adaptive method, None for a fixed-step one.
    """

    def __init__(self, problem: Problem, norm: TokenNorm | None = None, max_num_steps: float = 0) -> None:
        super().__init__(problem)
        self.norm = norm
        self.max_num_steps = max_num_steps
        self.tried = 0
        self.clock = problem.start.new_zeros(())

    def callback_step(self, clock: Tensor, latents: Tensor, dt: Tensor) -> None:
        """A step of length `dt` is about to be tried from `latents` (B, N, D), the state at `clock`."""
        arrived = bool(clock > self.clock)
        if arrived:
            self.clock = clock
            if self.record.arrive(latents, self.problem.level(clock.to(latents.dtype))):
                raise Ended("by the callback")
        if self.norm is None:
            return
        self.tried += 1
        if self.tried > self.max_num_steps:
            self.fail_all(f"the solve was not done after max_num_steps={self.max_num_steps} steps")
        # A step whose error is infinite can only have been accepted because none shorter was allowed.
        if not clock + dt > clock or (arrived and bool(self.norm.largest.isinf())):
            self._explain(self.norm)

    def callback_step_adjoint(self, clock: Tensor, _state: object, dt: Tensor) -> None:
        """The same in the backward solve of the adjoint method."""
        if not clock + dt > clock:
            level = self.problem.level(clock.to(self.span.dtype))
            raise SolverError(
                f"the backward solve is stuck at levels from {level.min().item():.6g} to {level.max().item():.6g}: its "
                "step size underflowed, for the field or its gradient is NaN there, or jumps"
            )

    def _explain(self, norm: TokenNorm) -> NoReturn:
        """End the solve because no step was small enough, and say for which tokens."""
        broken, refused = ~norm.errors.isfinite(), norm.errors > 1
        if broken.any():
            self.fail(broken, self.record.level, "the field gave NaN or infinity, however small the step")
        if refused.any():
            reason = "the step size underflowed, for the field jumps or is too stiff for these tolerances"
            self.fail(refused, self.record.level, reason)
        self.fail_all("the step size underflowed, for no token here: on account of another rank, if there is one")
