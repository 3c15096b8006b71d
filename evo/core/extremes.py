"""Are the learned levels at least as good as level 0 everywhere, and as level 1 everywhere?

B batch, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The logit at which a level counts as arrived: 1e-4 from its end.
_ARRIVED = 9.2


def pushed(levels: Tensor, slope: Tensor) -> Tensor:
    """What a loss sums so that levels (...) fall where `slope`, broadcast to them, is above 0, and rise where it is below, with gradient.

    It is a slope in the logit. A level that has arrived at the end it moves to is left alone. One at the other end, from which the bound
    has next to no gradient left in the logit, has all of it here.
    """
    number = torch.finfo(levels.dtype)
    logit = levels.clamp(number.tiny, 1 - number.eps).logit()
    return torch.where(slope * logit > -slope.abs() * _ARRIVED, slope * logit, 0.0)


class Extremes(nn.Module):
    """What the head's levels cost beyond level 0, and beyond level 1, as training goes on; and the way to an end that is better.

    The bound has a basin at either end: one token that leaves the level of all others mostly loses, where all of them together would
    gain, so the gradient in single levels cannot lead from one to the other. Random levels visit both ends at every step and tell what
    they cost. Where an end costs less than the head's levels, `slope` is what is beyond doubt of the difference, the slope of the chord
    to that end, times `gain`; where the head is as good as both it is 0, and the gradient of the bound alone decides.

    Costs fall as the network learns, so only costs of the same step are compared: kept are running means of their differences.

    Args:
        decay: of the running means, per update.
        gain: the chord's slope is multiplied by this, so that it prevails over single levels' gradients that point the other way.
        doubt: standard errors that are taken off a difference; what is left counts, if it is above 0.
    """

    weights: Tensor
    squared_weights: Tensor
    differences: Tensor
    squares: Tensor

    def __init__(self, decay: float = 0.99, gain: float = 10.0, doubt: float = 2.0) -> None:
        super().__init__()
        if not 0 <= decay < 1 or gain < 0 or doubt < 0:
            raise ValueError(
                f"decay {decay}, gain {gain}, doubt {doubt}: needed decay in [0, 1), the others at least 0"
            )
        self.decay, self.gain, self.doubt = decay, gain, doubt
        # Each (2,): beyond level 0, and beyond level 1.
        for name in ("weights", "squared_weights", "differences", "squares"):
            self.register_buffer(name, torch.zeros(2, dtype=torch.float64))

    def beyond(self) -> tuple[Tensor, Tensor]:
        """What the head costs beyond each end, nats per token, (2,), and the standard error of that.

        Both are NaN where nothing has been seen, and the error also where all rests on a single step.
        """
        mean = self.differences / self.weights
        share = self.squared_weights / self.weights.square()  # 1 / how many steps it rests on
        # One step alone has no spread; as its weight decays, rounding would make one up.
        spread = torch.where(share < 1 - 1e-9, 1 - share, torch.nan)
        variance = (self.squares / self.weights - mean.square()).clamp(min=0) / spread
        return mean, (variance * share).sqrt()

    def slope(self) -> Tensor:
        """`gain` times what is lost to the better end beyond doubt, nats per token, 0-dim float64: levels should fall where it is
        above 0, and rise where it is below.
        """
        mean, error = self.beyond()
        to_zero, to_one = torch.nan_to_num(mean - self.doubt * error, nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0)
        return self.gain * torch.where(to_zero >= to_one, to_zero, -to_one)

    def push(self, levels: Tensor) -> Tensor:
        """What a loss sums so that levels (...) of a head move to the end that is better, with gradient: `pushed` by `slope`."""
        return pushed(levels, self.slope().to(levels.dtype))

    figures = 6
    """How many sums `tally` gives."""

    @staticmethod
    def tally(*found: tuple[Tensor, Tensor]) -> Tensor:
        """What costs found at the head's levels, at level 0 and at level 1, in this order, add: (6,) float64.

        Each is given as nats (B', N) and bool (B', N), which of them count, and makes the sum of the nats and their number. Tallies of
        parts of a batch add up to that of the batch.
        """
        sums = [(torch.where(counted, nats.detach(), 0.0).sum(), counted.sum()) for nats, counted in found]
        return torch.stack([value.double() for pair in sums for value in pair])

    @torch.no_grad()
    def update(self, tally: Tensor) -> None:
        """Take note of one step's tally (6,); nothing waits for the device.

        Each end is compared with the head by their means, a comparison that rests on as many tokens as the smaller of the two has.
        """
        nats, tokens = tally.view(3, 2).unbind(1)
        mean = nats / tokens
        difference = mean[0] - mean[1:]
        weight = torch.where(difference.isfinite(), torch.minimum(tokens[0], tokens[1:]), 0.0)
        difference = torch.where(weight > 0, difference, 0.0)
        new = (weight, weight.square(), weight * difference, weight * difference.square())
        decays = (self.decay, self.decay**2, self.decay, self.decay)
        kept = (self.weights, self.squared_weights, self.differences, self.squares)
        for buffer, decay, value in zip(kept, decays, new, strict=True):
            buffer.mul_(decay).add_(value)
