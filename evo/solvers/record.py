"""How far a solve has come."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Problem
from .solution import Solution, Trajectory


class Record:
    """The state of one solve after each step: `step`, `latents` (B, N, D), `level` (B, N).

    Serves trajectory and callback, holds frozen tokens, and notes failures where the problem asks for it.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.step = 0
        self.latents, self.level = problem.latents, problem.start
        self.visited = [(self.latents, self.level)]
        self.failed_at: Tensor | None = None
        self.reason = ""
        if problem.watch:
            self.reason = "its latent became NaN or infinite"
            self.failed_at = torch.where(problem.lost(problem.latents), problem.start, float("nan")).detach()

    def arrive(self, latents: Tensor, level: Tensor) -> bool:
        """Note the state at the end of a step; returns whether the callback ends the solve there."""
        problem = self.problem
        latents = problem.hold(latents)
        if self.failed_at is not None:
            lost_now = problem.lost(latents) & self.failed_at.isnan()
            self.failed_at = torch.where(lost_now, self.level.detach(), self.failed_at)
        self.step += 1
        self.latents, self.level = latents, level
        if problem.trajectory:
            self.visited.append((latents, level))
        return problem.callback is not None and bool(problem.callback(self.step, level, latents))

    def solution(self, nfe: int) -> Solution:
        """The solution, if the solve ends here."""
        trajectory = None
        if self.problem.trajectory:
            latents, level = zip(*self.visited, strict=True)
            trajectory = Trajectory(latents=torch.stack(latents), level=torch.stack(level))
        return Solution(
            latents=self.latents,
            level=self.level,
            nfe=nfe,
            start=self.problem.start,
            end=self.problem.end,
            trajectory=trajectory,
            failed_at=self.failed_at,
            reason=self.reason,
        )
