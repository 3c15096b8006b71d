"""The latent space: one point for every vocabulary entry.

V vocabulary, D latent dimension.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from evo.schedules import Schedule


class Embeddings(nn.Module, ABC):
    """One latent e(v) for every vocabulary entry v.

    Args:
        vocab_size: V, at least 2.
        dim: D, the latent dimension.
        radius: its square is half the squared distance between two entries on average; None is sqrt(2 ln V).

    Raises:
        ValueError: for a vocabulary of fewer than two entries, a dimension below one, or a radius that is not positive.
    """

    def __init__(self, vocab_size: int, dim: int, radius: float | None = None) -> None:
        super().__init__()
        if vocab_size < 2:
            raise ValueError(f"vocab_size is {vocab_size}; a latent space needs at least 2 entries to tell apart")
        if dim < 1:
            raise ValueError(f"dim is {dim}; a latent space needs at least 1 dimension")
        radius = math.sqrt(2 * math.log(vocab_size)) if radius is None else radius
        if not (math.isfinite(radius) and radius > 0):
            raise ValueError(f"radius is {radius}; it must be positive and finite (None is sqrt(2 ln V))")
        self.vocab_size, self.dim, self.radius = vocab_size, dim, radius

    def _random_table(self, std: float) -> Tensor:
        """Random entries (V, D), from a stream of their own that the global one seeds.

        Straight from the global stream they would be the very numbers that a generator with the same seed gives as noise, and noise
        that points at embeddings makes every bound wrong.
        """
        table = torch.empty(self.vocab_size, self.dim)
        if table.is_meta:
            return table
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        return table.normal_(std=std, generator=torch.Generator(table.device).manual_seed(seed))

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """e(v) for every entry, (V, D)."""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """e(x) of token ids (...): (..., D)."""

    def log_likelihood(self, latents: Tensor, level: Tensor, schedule: Schedule) -> Tensor:
        """Of every entry, log N(z; s e(v), n² I) up to a constant in v, in nats: (..., D) and (...) -> (..., V).

        0 below `schedule.t_min`, see `evidence_query`.
        """
        return evidence_query(latents, level, schedule) @ evidence_table(self.weight).to(latents.dtype).T

    def expected(self, latents: Tensor, level: Tensor, schedule: Schedule) -> Tensor:
        """The best linear estimate of the clean latents behind noisy ones: (..., D) at levels (...) -> (..., D).

        It is s a² z / (s² a² + n²) with a² = radius² / D, the variance of an entry in each dimension: nothing of pure noise, and all of
        a realised token, below `schedule.t_min`.
        """
        noisy, level = level >= schedule.t_min, level.clamp(min=schedule.t_min)
        signal, noise, power = schedule.signal(level), schedule.noise(level), self.radius**2 / self.dim
        share = torch.where(noisy, power * signal / (power * signal.square() + noise.square()), 1.0)
        return latents * share.unsqueeze(-1).to(latents.dtype)

    def nearest(self, latents: Tensor) -> Tensor:
        """The entry whose embedding is nearest to each latent: (..., D) -> (...) ids."""
        weight = self.weight.to(latents.dtype)
        return (latents @ weight.T - 0.5 * weight.square().sum(-1)).argmax(-1)

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, dim={self.dim}, radius={self.radius:.4g}"


class LatentSpace(Embeddings):
    """Learned embeddings e(v), held on a sphere.

    Only the radius and the size of the vocabulary decide at which noise level a token becomes unreadable, so the radius is fixed
    and only directions are learned. The default sqrt(2 ln V) places that level in the middle of [0, 1] for a cosine schedule.

    Args:
        vocab_size: V, at least 2.
        dim: D, the latent dimension.
        radius: the norm of every embedding; None is sqrt(2 ln V).

    Raises:
        ValueError: for a vocabulary of fewer than two entries, a dimension below one, or a radius that is not positive.
    """

    def __init__(self, vocab_size: int, dim: int, radius: float | None = None) -> None:
        super().__init__(vocab_size, dim, radius)
        # Near unit norm: a step of Adam then turns a direction by about its learning rate times sqrt(D).
        self.directions = nn.Parameter(self._random_table(dim**-0.5))

    @property
    def weight(self) -> Tensor:
        """e(v) for every entry, (V, D). Computed at each access: take it once per call and pass it on."""
        return self.radius * F.normalize(self.directions, dim=-1)

    def embed(self, tokens: Tensor) -> Tensor:
        """e(x) of token ids (...): (..., D), without normalising the rest of the table."""
        return self.radius * F.normalize(F.embedding(tokens, self.directions), dim=-1)


def evidence_table(embeddings: Tensor) -> Tensor:
    """Embeddings (V, D) with half their squared norm behind them, (V, D+1), float32 or wider: what `evidence_query` is multiplied with."""
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return torch.cat([embeddings, 0.5 * embeddings.square().sum(-1, keepdim=True)], dim=-1)


def evidence_query(latents: Tensor, level: Tensor, schedule: Schedule) -> Tensor:
    """The query (..., D+1) of latents (..., D) at levels (...) whose product with the evidence table is l, (..., V), in nats.

    l(v) = (s <z, e(v)> - s² |e(v)|² / 2) / n² is Bayes' term for a latent seen through Gaussian noise, one matrix product.
    It is 0 below `schedule.t_min`, where a token is realised and there is nothing to add.
    """
    noisy = level >= schedule.t_min
    level = level.clamp(min=schedule.t_min)
    signal, noise = schedule.signal(level), schedule.noise(level)
    precision = torch.where(noisy, signal / noise.square(), 0.0)
    return torch.cat([precision.unsqueeze(-1) * latents, -(precision * signal).unsqueeze(-1)], dim=-1)
