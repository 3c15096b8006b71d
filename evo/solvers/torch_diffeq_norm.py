"""The error norm that adaptive methods control their steps by."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .contract import Problem


class TokenNorm:
    """The largest root-mean-square over the latent of any live token, and over the ranks of a process group.

    A mean over all tokens, torchdiffeq's own norm, lets frozen and easy tokens pay for the hard ones. The maximum over
    ranks makes all of them take the same steps, without which collectives inside the field would not meet.

    An error that is NaN counts as infinite: the step is then tried again, smaller, and does not poison the step size.
    `errors` (B, N) are those of the tokens in the latest step, `largest` what was made of them.
    """

    def __init__(self, problem: Problem, group: dist.ProcessGroup | None) -> None:
        self.live = problem.live
        self.group = group
        self.errors = torch.zeros_like(problem.start)
        self.largest = problem.start.new_zeros(())

    @torch.no_grad()
    def __call__(self, scaled: Tensor) -> Tensor:
        """The norm, 0-dim, of an error (B, N, D) that is already divided by its tolerance."""
        errors = _rms(scaled)
        self.errors = errors if self.live is None else torch.where(self.live, errors, 0.0)
        self.largest = self._largest(self.errors.flatten())
        return self.largest

    @torch.no_grad()
    def adjoint(self, scaled: tuple[Tensor, ...]) -> Tensor:
        """The same in the backward solve, over latents, all cotangents and the gradients of the parameters."""
        _, latents, cotangents, *parameters = scaled
        errors = _rms(latents) if self.live is None else torch.where(self.live, _rms(latents), 0.0)
        return self._largest(
            torch.cat((errors.flatten(), _rms(cotangents).flatten(), *(_rms(p.flatten()).view(1) for p in parameters)))
        )

    def _largest(self, errors: Tensor) -> Tensor:
        largest = torch.cat((errors, errors.new_zeros(1))).nan_to_num(nan=math.inf, posinf=math.inf).max()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest


def _rms(error: Tensor) -> Tensor:
    """Root mean square over the last axis, which overflows only where the error itself does."""
    largest = error.abs().amax(-1).clamp(min=torch.finfo(error.dtype).tiny)
    return (error / largest.unsqueeze(-1)).square().mean(-1).sqrt() * largest
