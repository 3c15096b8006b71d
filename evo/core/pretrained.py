"""The vocabulary of a pretrained model as a latent space, without changing a word of what that model says.

A pretrained embedding E(v) has a length of its own and sometimes a near twin, so it is not a point on a sphere. What decides at
which level a token becomes unreadable is the distance between entries, not their length. The latent of an entry is therefore

    e(v) = ( a·E(v), c·u_v ),   D = W + k,

with random unit vectors u_v in k further dimensions. The power of two a and the length c make the mean squared distance between
two entries the 4·ln V of the default latent space, of which the u_v have at least half: however alike two embeddings are, their
entries stay apart (measured for V = 32 000, a thousand of them all alike, and k = 128: by .68 of the usual distance). Reading e(v)
back is one linear map that gives E(v) bit for bit, because a is a power of two (in float16, of what a does not make too small for
it); a noisy latent arrives as E(v), scaled by the signal and blurred by the noise.

B batch, N tokens, V vocabulary, W width, D latent dimension, k further dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evo.core.latent_space import Embeddings
from evo.heads import LinearReadout, TiedReadout

# Of the directions u_v. Not a seed that anybody would draw noise with: noise that points at embeddings makes every bound wrong.
_SEED = 0x45766F_1A7E47


@dataclass(frozen=True, kw_only=True)
class PretrainedVocabulary:
    """How a pretrained vocabulary is held, which `EvoConfig` remembers.

    Args:
        scale: a, a power of two; see the head of this file.
        slack: k, dimensions beyond the embedding.
        tied: whether context logits are read off with the embeddings themselves, or with a table of their own.
    """

    scale: float
    slack: int
    tied: bool

    def __post_init__(self) -> None:
        if not (0 < self.scale < math.inf and math.frexp(self.scale)[0] == 0.5):
            raise ValueError(f"scale is {self.scale}; a power of two is needed, which rounds nothing")
        if self.slack < 1:
            raise ValueError(f"slack is {self.slack}; at least one further dimension is needed to keep twins apart")

    @classmethod
    def of(cls, embeddings: Tensor, *, tied: bool, slack: int = 128) -> PretrainedVocabulary:
        """The scale for embeddings (V, W): the largest power of two that leaves half of the squared distance to the slack."""
        variance = _total_variance(embeddings)
        if not (0 < variance < math.inf):
            raise ValueError(f"the embeddings have total variance {variance}; they must be finite and not all alike")
        ideal = math.sqrt(0.5 * _squared_radius(len(embeddings)) / variance)
        return cls(scale=2.0 ** math.floor(math.log2(ideal)), slack=slack, tied=tied)

    def lift(self, embeddings: Tensor) -> Tensor:
        """e(v) of pretrained embeddings (V, W): (V, D), in their dtype."""
        size, width = embeddings.shape
        table = embeddings.new_empty(size, width + self.slack)
        torch.mul(embeddings, self.scale, out=table[:, :width])
        left = _squared_radius(size) - self.scale**2 * _total_variance(embeddings)
        directions = torch.randn(size, self.slack, generator=torch.Generator().manual_seed(_SEED))
        table[:, width:] = math.sqrt(left) * F.normalize(directions, dim=-1)
        return table

    def latent_space(self, vocab_size: int, width: int) -> PretrainedLatentSpace:
        """The latent space, its table not yet filled."""
        return PretrainedLatentSpace(vocab_size, width + self.slack)

    def embed(self, width: int) -> PretrainedEmbed:
        """The map from latents to hidden states."""
        return PretrainedEmbed(width, self.slack, self.scale)

    def readout(self, vocab_size: int, width: int) -> TiedReadout | LinearReadout:
        """The map from hidden states to context logits."""
        return TiedReadout(width, self.scale) if self.tied else LinearReadout(width, vocab_size)


class PretrainedLatentSpace(Embeddings):
    """Embeddings kept as they are, in a table (V, D); made by `PretrainedVocabulary.lift`.

    Args:
        vocab_size: V.
        dim: D.
    """

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__(vocab_size, dim)
        self.table = nn.Parameter(self._random_table(self.radius * dim**-0.5))

    @property
    def weight(self) -> Tensor:
        """e(v) for every entry, (V, D)."""
        return self.table

    def embed(self, tokens: Tensor) -> Tensor:
        """e(x) of token ids (...): (..., D)."""
        return F.embedding(tokens, self.table)


class PretrainedEmbed(nn.Module):
    """The pretrained embedding of a latent, and what is learned of its further dimensions (nothing at first): (B, N, D) -> (B, N, W).

    Args:
        width: W.
        slack: k.
        scale: a.
    """

    def __init__(self, width: int, slack: int, scale: float) -> None:
        super().__init__()
        self.width, self.scale = width, scale
        self.slack = nn.Parameter(torch.zeros(width, slack))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, W)."""
        pretrained, further = latents[..., : self.width], latents[..., self.width :]
        return pretrained / self.scale + F.linear(further, self.slack)


def _squared_radius(vocab_size: int) -> float:
    return 2 * math.log(vocab_size)


def _total_variance(embeddings: Tensor) -> float:
    """E|E(v) - mean|², in chunks: half the mean squared distance between two entries."""
    total = torch.zeros(embeddings.shape[1], dtype=torch.float64)
    squares = 0.0
    for rows in embeddings.split(4096):
        rows = rows.double()
        total += rows.sum(0).cpu()
        squares += rows.square().sum().item()
    return squares / len(embeddings) - (total / len(embeddings)).square().sum().item()
