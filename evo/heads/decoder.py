"""From a refined latent back to a token.

Every decoder is called as `decoder(logits, denoised, embeddings, generator) -> tokens`: log p(v|z), or any logits of it,
(..., V), the denoised latent (..., D) and the embeddings (V, D).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from evo.heads.prior import NucleusPrior


class Decoder(Protocol):
    """What `generate` needs of a decoder."""

    def __call__(
        self, logits: Tensor, denoised: Tensor, embeddings: Tensor, generator: torch.Generator | None = None
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class LinearDecoder:
    """The paper's linear projection: read the token off p(v|z), which is linear in the latent before its softmax.

    Args:
        prior: how a token is taken from p(v|z); the default takes the most probable.
    """

    prior: NucleusPrior = field(default_factory=lambda: NucleusPrior(temperature=0.0))

    def __call__(
        self, logits: Tensor, denoised: Tensor, embeddings: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Posterior logits (..., V) -> token ids (...)."""
        return self.prior(logits, generator)


@dataclass(frozen=True)
class NearestNeighborDecoder:
    """The vocabulary entry whose embedding is nearest to the denoised latent."""

    def __call__(
        self, logits: Tensor, denoised: Tensor, embeddings: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Denoised latents (..., D) and embeddings (V, D) -> token ids (...)."""
        embeddings = embeddings.to(denoised.dtype)
        return (denoised @ embeddings.T - 0.5 * embeddings.square().sum(-1)).argmax(-1)
