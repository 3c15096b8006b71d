"""Are the learned levels at least as good as level 0 everywhere, and as level 1 everywhere?"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Extremes(nn.Module):
    """Running means of the bound at level 0, at the head's levels and at level 1, and the way to the better end.

    The bound has a basin at either end: one token that leaves the level of all others mostly loses, where all of them together would
    gain, so the gradient in single levels cannot lead from one to the other. Random levels visit both ends at every step and tell what
    they cost. Where an end costs less than the head's levels, `slope` is the difference, the slope of the chord to that end; where the
    head is better than both it is 0, and the gradient of the bound alone decides.

    Args:
        decay: of the running means, per update.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, decay: float = 0.98) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must lie in [0, 1)")
        self.decay = decay
        # At level 0, at the head's levels, at level 1.
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(3, dtype=torch.float64))

    def means(self) -> Tensor:
        """Nats per token at level 0, at the head's levels and at level 1: (3,) float64, NaN where nothing has been seen."""
        return self.sums / self.counts

    def slope(self) -> Tensor:
        """Nats per token lost against the better end, 0-dim float64: above 0 where levels should fall, below 0 where they should rise."""
        zero, head, one = self.means()
        best = torch.fmin(zero, one)
        lost = torch.nan_to_num(head - best, nan=0.0).clamp(min=0)
        return torch.where(zero.nan_to_num(torch.inf) <= one.nan_to_num(torch.inf), lost, -lost)

    @torch.no_grad()
    def update(self, bound: Tensor, scored: Tensor) -> None:
        """Take note of (3,) sums of nats and (3,) numbers of tokens scored; nothing waits for the device."""
        seen = bound.isfinite()
        self.sums.mul_(self.decay).add_(torch.where(seen, bound.double(), 0.0))
        self.counts.mul_(self.decay).add_(torch.where(seen, scored.double(), 0.0))
