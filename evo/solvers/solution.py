"""What a solve returns: where every token ended, at what price, and in what state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class SolverError(RuntimeError):
    """A solve could not be completed. The message says at which level, for which tokens, and why."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The states of a solve of S steps: `latents` (S+1, B, N, D) and `level` (S+1, B, N), the start first."""

    latents: Tensor
    level: Tensor


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The end of a solve.

    `latents` (B, N, D) and `level` (B, N) are what was reached; `level` differs from `end` where a callback ended the
    solve or an adaptive method failed. `nfe` counts evaluations of the field, each over the whole batch. `start` and
    `end`, (B, N), are the levels that were asked for. `trajectory` is None unless it was requested.

    `failed_at` (B, N) holds the level at which the failing step began for every token that was lost, and NaN for the
    others. It is None where nothing was looked for: `integrate` with `throw=True` raises instead. `reason` says why.
    """

    latents: Tensor
    level: Tensor
    nfe: int
    start: Tensor
    end: Tensor
    trajectory: Trajectory | None = None
    failed_at: Tensor | None = None
    reason: str = ""

    @property
    def failure(self) -> str:
        """What failed, for which tokens and where, in one sentence; empty where nothing did."""
        if self.failed_at is None or not (failed := (~self.failed_at.isnan()).nonzero().tolist()):
            return ""
        shown = ", ".join(f"({b}, {i}) at level {self.failed_at[b, i].item():.6g}" for b, i in failed[:4])
        more = f" and {len(failed) - 4} more" if len(failed) > 4 else ""
        return f"{self.reason}, for the tokens (sequence, position) {shown}{more}, where the failing step began"

    @property
    def status(self) -> list[list[str]]:
        """One sentence per token, B lists of N. Made when asked for, so that a solve does not pay for it."""
        failed_at = self.level.new_full(self.level.shape, float("nan")) if self.failed_at is None else self.failed_at
        columns = (self.start, self.end, self.level, failed_at)
        sequences = zip(*(column.detach().tolist() for column in columns), strict=True)
        return [[self._sentence(*token) for token in zip(*sequence, strict=True)] for sequence in sequences]

    def _sentence(self, start: float, end: float, level: float, failed_at: float) -> str:
        if failed_at == failed_at:  # not NaN
            return f"Failed in the step that began at level {failed_at:.6g}: {self.reason}."
        if start == end:
            return f"Frozen at level {level:.6g}, where it starts and ends."
        if level == end:
            return f"Reached level {level:.6g}."
        return f"Stopped at level {level:.6g} on the way from {start:.6g} to {end:.6g}."
