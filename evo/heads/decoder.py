"""From a refined latent back to a token.

Every decoder is called as `decoder(logits, denoised, embeddings, uniform) -> tokens`: log p(v|z), or any logits of it, (..., V), the
denoised latent (..., D), the embeddings (V, D), and one number in [0, 1) for each token (...), for those that draw.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .prior import NucleusPrior, Prior


class Decoder(Protocol):
    """What `generate` needs of a decoder."""

    def __call__(self, logits: Tensor, denoised: Tensor, embeddings: Tensor, uniform: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class LinearDecoder:
    """The paper's linear projection: read the token off p(v|z), which is linear in the latent before its softmax.

    Args:
        prior: how a token is taken from p(v|z); the default takes the most probable.
    """

    prior: Prior = field(default_factory=lambda: NucleusPrior(temperature=0.0))

    def __call__(self, logits: Tensor, denoised: Tensor, embeddings: Tensor, uniform: Tensor) -> Tensor:
        """Posterior logits (..., V) and numbers (...) in [0, 1) -> token ids (...)."""
        return self.prior(logits, uniform)


@dataclass(frozen=True)
class NearestNeighborDecoder:
    """The vocabulary entry whose embedding is nearest to the denoised latent, among those whose logit is not -inf."""

    def __call__(self, logits: Tensor, denoised: Tensor, embeddings: Tensor, uniform: Tensor) -> Tensor:
        """Logits (..., V), denoised latents (..., D) and embeddings (V, D) -> token ids (...)."""
        embeddings = embeddings.to(denoised.dtype)
        nearness = denoised @ embeddings.T - 0.5 * embeddings.square().sum(-1)
        return nearness.masked_fill(logits == -torch.inf, -torch.inf).argmax(-1)
