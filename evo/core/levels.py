"""Which noise level each token is sketched at, before the head has learned to say so.

B batch, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """How training strays from the levels of the head.

    Args:
        share: of the sequences, in [0, 1], that have random levels instead; rounded to whole sequences of the batch.
        noise: scale of the logistic noise added to the logit of the head's levels for the other sequences, at least 0.
    """

    share: float = 0.5
    noise: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.noise < 0:
            raise ValueError(
                f"share {self.share}, noise {self.noise}: share must lie in [0, 1] and noise must be at least 0"
            )


def random_levels(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Levels (B, N) to explore with: constant, per span and per token, exact zeros and ones among them.

    Every kind fills a share of the batch (constant 3/8, spans 3/8, tokens 2/8). Spans change their level from one token to the next with
    probability 1/8. Each level drawn is exactly 0 with probability 1/6, exactly 1 with probability 1/6, otherwise uniform.
    """
    batch, length = shape
    device, dtype = like.device, like.dtype

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).uniform_(generator=generator)

    # Low-discrepancy over the batch, so that every kind appears in every batch that is large enough.
    kind = (torch.arange(batch, device=device) / batch + uniform(1)) % 1
    switch = torch.where(kind < 3 / 8, 0.0, torch.where(kind < 6 / 8, 1 / 8, 1.0))
    span = (uniform(batch, length) < switch[:, None]).cumsum(1)
    span = span - span[:, :1]
    drawn = (1.5 * uniform(batch, length) - 0.25).clamp(0, 1)
    return drawn.gather(1, span)


def with_logistic_noise(levels: Tensor, scale: float, generator: torch.Generator | None) -> Tensor:
    """Levels (B, N) moved by logistic noise of the given scale in their logit; differentiable in the levels."""
    if scale == 0:
        return levels
    u = torch.empty_like(levels).uniform_(generator=generator)
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
