"""Where on the clock the flow is measured: drawn from a running estimate of where its integrand lives.

B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClockDensity(nn.Module):
    """A piecewise constant density of clock values, made to follow the root mean square of the flow integrand.

    An integral estimated at one point, weighted by 1 / density, has least variance where the density is proportional to that root
    (importance sampling; Kahn and Marshall 1953). A share `floor` stays uniform, so that no weight exceeds 1 / floor, whatever the
    estimate, and the expectation is the integral for every density.

    The density is one of what *remains* of the clock, r = end - c, where `end` is when the last token of a sequence arrives
    (`Path.stretch`): on `early_stop` and `late_start` r + t_min is the highest level left, which is what the integrand depends on.

    Args:
        bins: of the density, over r in [0, 1].
        floor: share of the density that is uniform, in (0, 1]; 1 is uniform sampling.
        decay: of the running means, per update.
    """

    squares: Tensor
    counts: Tensor

    def __init__(self, bins: int = 32, floor: float = 0.3, decay: float = 0.99) -> None:
        super().__init__()
        if bins < 1 or not 0 < floor <= 1 or not 0 <= decay < 1:
            raise ValueError(
                f"bins {bins}, floor {floor}, decay {decay}: needed bins >= 1, floor in (0, 1], decay in [0, 1)"
            )
        self.bins, self.floor, self.decay = bins, floor, decay
        self.register_buffer("squares", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.float64))

    def probabilities(self) -> Tensor:
        """Of each bin, (bins,) float64."""
        overall = self.squares.sum() / self.counts.sum().clamp(min=1e-12)
        # A bin that nothing has been seen of counts as an average one.
        mean = (self.squares + 1e-6 * overall) / (self.counts + 1e-6)
        root = mean.sqrt() + torch.finfo(torch.float64).tiny
        padded = torch.cat([root[:1], root, root[-1:]])
        smooth = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
        uniform = torch.full_like(smooth, 1 / self.bins)
        learned = torch.where(self.counts.sum() > 0, smooth / smooth.sum(), uniform)
        return torch.lerp(learned, uniform, self.floor)

    def forward(self, share: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Points r (B,) in [0, length] and 1 / density there (B,), from uniform `share` (B,) in [0, 1) and lengths (B,) in [0, 1].

        Where the length is 0, r and the weight are 0.
        """
        probabilities = self.probabilities()
        edges = torch.cat([probabilities.new_zeros(1), probabilities.cumsum(0)])
        within = length.double() * self.bins
        last = within.floor().long().clamp(max=self.bins - 1)
        mass = edges[last] + (within - last) * probabilities[last]
        drawn = share.double() * mass
        chosen = torch.searchsorted(edges[1:], drawn, right=True).clamp(max=self.bins - 1)
        r = (chosen + (drawn - edges[chosen]) / probabilities[chosen]) / self.bins
        weight = mass / (probabilities[chosen] * self.bins)
        return r.clamp(min=0).to(length.dtype).minimum(length), weight.to(length.dtype)

    @property
    def figures(self) -> int:
        """How many sums `tally` gives."""
        return 2 * self.bins

    @torch.no_grad()
    def tally(self, r: Tensor, integrand: Tensor) -> Tensor:
        """What an integrand (B,), nats per unit of clock, found at points r (B,) adds: (2 * bins,) float64.

        Squares by bin, then how many there were; tallies of parts of a batch add up to that of the batch.
        """
        value = integrand.double().square()
        seen = value.isfinite()
        bin_of = (r.double() * self.bins).long().clamp(0, self.bins - 1)
        sums = torch.zeros(2, self.bins, dtype=torch.float64, device=r.device)
        return sums.index_add_(1, bin_of, torch.stack([torch.where(seen, value, 0.0), seen.double()])).flatten()

    @torch.no_grad()
    def update(self, tally: Tensor) -> None:
        """Take note of one step's tally (2 * bins,); nothing waits for the device."""
        squares, counts = tally.view(2, self.bins)
        self.squares.mul_(self.decay).add_(squares)
        self.counts.mul_(self.decay).add_(counts)
