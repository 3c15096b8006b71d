"""Which noise level each token is sketched at, before the head has learned to say so.

B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evo.core.chance import Chance
from evo.core.part import to_device

# Steps of the golden ratio from any start: every run of neighbours covers the circle evenly (Weyl; Knuth, vol. 3, 6.4).
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """How training strays from the levels of the head.

    Args:
        share: of the sequences, in [0, 1], that have random levels instead; rounded down to whole sequences of the batch.
        noise: scale of the logistic noise added to the logit of the head's levels for the other sequences, at least 0.
        masked: of the sequences with random levels, the share, in [0, 1], in which every token is either known, at level 0, or not at all,
            at level 1, and is refined as it is: what a network learns from when it is to write in any order.
    """

    share: float = 0.5
    noise: float = 0.5
    masked: float = 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.masked <= 1 and self.noise >= 0):
            raise ValueError(
                f"share {self.share}, masked {self.masked}, noise {self.noise}: shares must lie in [0, 1] and noise must be at least 0"
            )


class Explored(NamedTuple):
    """Levels to explore with.

    Attributes:
        levels: (B, N).
        masked: bool (B,), the sequences whose tokens are known or not at all.
    """

    levels: Tensor
    masked: Tensor


def random_levels(ranks: Sequence[int], length: int, masked: float, chance: Chance, like: Tensor) -> Explored:
    """Levels to explore with: masks, constant ones, per span and per token, exact zeros and ones among them.

    `ranks` are the places of the B sequences among all that explore, over which the kinds are spread.

    A share of the batch is `masked`: each token is at level 1 with a probability of its sequence, spread evenly over [0, 1], else at 0. Of
    the rest every other kind fills a share (constant 3/8, spans 3/8, tokens 2/8). Spans change their level from one token to the next with
    probability 1/8. Each level drawn is exactly 0 with probability 1/6, exactly 1 with probability 1/6, otherwise uniform.
    """
    # Low-discrepancy, so that every kind appears in every batch that is large enough; and not in step with the clock, of which otherwise
    # each kind would see but a stretch.
    turns = torch.tensor([rank * _GOLDEN % 1 for rank in ranks], dtype=like.dtype)
    kind = (to_device(turns, like.device) + chance.shared(like)) % 1
    drawn, mask = chance.uniform(length, like=like), kind < masked
    unknown = drawn < (kind / masked if masked else kind)[:, None]
    other = (kind - masked) / (1 - masked) if masked < 1 else kind
    switch = torch.where(other < 3 / 8, 0.0, torch.where(other < 6 / 8, 1 / 8, 1.0))
    span = (chance.uniform(length, like=like) < switch[:, None]).cumsum(1)
    levels = (1.5 * drawn - 0.25).clamp(0, 1).gather(1, span - span[:, :1])
    return Explored(torch.where(mask[:, None], unknown.to(levels.dtype), levels), mask)


def with_logistic_noise(levels: Tensor, scale: float, u: Tensor) -> Tensor:
    """Levels (B, N) moved by logistic noise of the given scale in their logit, made of u (B, N), uniform in [0, 1); differentiable."""
    if scale == 0:
        return levels
    edge = torch.finfo(levels.dtype).eps
    return (levels.logit(eps=1e-4) + scale * u.logit(eps=edge)).sigmoid()


def usage_entropy(levels: Tensor, present: Tensor, bins: int = 10) -> Tensor:
    """Entropy of the levels used across each sequence, in nats, from a soft histogram: (B, N), bool (B, N) -> (B,).

    Differentiable: each level is shared among bins by a Gaussian kernel whose deviation is half a bin.
    The regulariser of the paper's appendix 7.1.
    """
    centres = (torch.arange(bins, device=levels.device, dtype=levels.dtype) + 0.5) / bins
    share = (-2 * ((levels.unsqueeze(-1) - centres) * bins).square()).softmax(-1) * present.unsqueeze(-1)
    histogram = share.sum(1) / present.sum(1, keepdim=True).clamp(min=1)
    return -(histogram * histogram.clamp(min=torch.finfo(levels.dtype).tiny).log()).sum(-1)
