"""What kinds of layer a Transformer is made of: small descriptions that build modules.

B batch, N tokens, W width, F hidden width of the feed-forward layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class RMSNorm:
    """Root-mean-square normalisation (Zhang and Sennrich 2019): a gain, no bias.

    Args:
        eps: added to the mean square.
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def build(self, width: int) -> nn.RMSNorm:
        """The module for (..., width)."""
        return _RMSNorm(width, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """Layer normalisation (Ba et al. 2016): a gain and a bias.

    Args:
        eps: added to the variance.
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def build(self, width: int) -> nn.LayerNorm:
        """The module for (..., width)."""
        return _LayerNorm(width, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class SwiGLU:
    """Gated feed-forward layers, down(silu(gate(x)) * up(x)) (Shazeer 2020).

    Args:
        bias: whether the three maps have one.
    """

    bias: bool = False

    def build(self, width: int, hidden: int) -> GatedFeedForward:
        """The module for (B, N, W)."""
        return GatedFeedForward(width, hidden, self.bias)


@dataclass(frozen=True, kw_only=True)
class GELU:
    """Two feed-forward layers with biases, down(gelu(up(x))), GELU in its tanh form (Hendrycks and Gimpel 2016; GPT-2)."""

    def build(self, width: int, hidden: int) -> FeedForward:
        """The module for (B, N, W)."""
        return FeedForward(width, hidden)


class _RMSNorm(nn.RMSNorm):
    # Weights that are narrower than the residual stream, as shards gathered in bfloat16 are, do not narrow it.
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _LayerNorm(nn.LayerNorm):
    # See `_RMSNorm`.
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class GatedFeedForward(nn.Module):
    """See `SwiGLU`."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) -> (B, N, W)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FeedForward(nn.Module):
    """See `GELU`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) -> (B, N, W)."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def default_hidden(width: int) -> int:
    """F where nothing is said of it: 8/3 W, which gives three gated maps the size of two plain ones of 4 W, up to a multiple of 64."""
    return -(-8 * width // 3 // 64) * 64


def _check_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}; a norm needs it positive and finite")
