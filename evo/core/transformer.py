"""The backbone: a Transformer that is told, token by token, how noisy its input is.

B batch, N tokens, D latent dimension, W width, F hidden width of the feed-forward layers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evo.core.attention import Attention, rotary_angles
from evo.core.cache import Cache
from evo.core.masks import Causal, Lowered, Mask, as_positions, lower


class LevelEmbedding(nn.Module):
    """A sinusoidal embedding of the level of each token, added to its hidden state (paper §2.4).

    The features are sin(w t) and cos(w t) - 1 behind a linear map without bias. They vanish at t = 0, so that a realised token is
    an ordinary token and a sequence at level 0 sees an ordinary Transformer, whatever has been learned.

    Args:
        width: W.
        frequencies: how many, spaced geometrically from pi/2 to 8 pi. Higher ones would tell apart levels that mean the same, and
            make the gradient that reaches a learned level mostly their own oscillation.
    """

    def __init__(self, width: int, frequencies: int = 32) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linear = nn.Linear(2 * frequencies, width, bias=False)

    def forward(self, level: Tensor) -> Tensor:
        """Levels (B, N) -> (B, N, W)."""
        # Made anew each time: a buffer would follow the weights into bfloat16 and blur the levels.
        octaves = torch.linspace(0, 4, self.frequencies, device=level.device, dtype=level.dtype)
        angles = level.unsqueeze(-1) * (math.pi / 2 * octaves.exp2())
        features = torch.cat([angles.sin(), angles.cos() - 1], dim=-1)
        return self.linear(features.to(self.linear.weight.dtype))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)), (B, N, W) -> (B, N, W)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, heads: int, kv_heads: int | None, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, kv_heads)
        self.feed_forward_norm = nn.RMSNorm(width, eps=1e-6)
        self.feed_forward = FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Lowered, cache: Cache | None, layer: int, store: bool
    ) -> Tensor:
        """(B, N, W) -> (B, N, W); the further arguments are those of `Attention`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, mask, cache, layer, store))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """Latents and their levels in, hidden states out.

    Args:
        dim: D, of the latents.
        width: W.
        depth: number of blocks.
        heads, kv_heads: query heads and key/value heads; None is as many.
        hidden: F; None is 8/3 W rounded up to a multiple of 64.
        positions: how many positions there are, BOS included.
        dropout: on both residual branches.
        rope_base: base of the rotary frequencies.
        self_conditioning: take an earlier estimate of the clean latents as a second input.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        depth: int,
        heads: int,
        *,
        positions: int,
        kv_heads: int | None = None,
        hidden: int | None = None,
        dropout: float = 0.0,
        rope_base: float = 10_000.0,
        self_conditioning: bool = False,
    ) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 64) * 64 if hidden is None else hidden
        self.dim, self.width, self.positions = dim, width, positions
        self.head_dim, self.rope_base = width // heads, rope_base
        self.embed = nn.Linear(dim, width, bias=False)
        self.estimate_embed = nn.Linear(dim, width, bias=False) if self_conditioning else None
        self.level_embedding = LevelEmbedding(width)
        # The embedding of role `next` is zero by construction, which leaves a causal model untouched; this is role `own`.
        self.own_role = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, hidden, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self._initialise()

    @property
    def self_conditioned(self) -> bool:
        """Whether there is an input for an earlier estimate of the clean latents."""
        return self.estimate_embed is not None

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.normal_(self.own_role, std=0.02)
        if self.estimate_embed is not None:
            nn.init.zeros_(self.estimate_embed.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            for branch in (block.attention.out, block.feed_forward.down):
                branch.weight.data.mul_((2 * len(self.blocks)) ** -0.5)

    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        *,
        mask: Mask | None = None,
        own: Tensor | None = None,
        estimate: Tensor | None = None,
        cache: Cache | None = None,
        store: bool = False,
    ) -> Tensor:
        """Latents (B, N, D) at levels (B, N) -> hidden states (B, N, W).

        Args:
            mask: who sees whom; None is `Causal()`.
            own: bool (N,) or (B, N), True where a position speaks of its own token, False where of the next; None is nowhere.
            estimate: (B, N, D) what an earlier evaluation took the clean latents for (self-conditioning, Chen et al. 2022); None is nothing,
                and nothing is taken of it where the level is 0.
            cache: keys and values of earlier positions, seen by these, which stand behind them.
            store: add the keys and values of these positions to the cache.

        Raises:
            ValueError: if the tokens reach past the last position, or for an estimate that this network has no input for.
        """
        count, device = latents.shape[1], latents.device
        past = cache.length if cache is not None else 0
        if cache is not None:
            queries, keys = cache.positions(past, past + count), cache.positions(0, past + count)
        else:
            queries = keys = range(count)
        if past + count > self.positions:
            raise ValueError(
                f"{past + count} positions (BOS included) do not fit this model's {self.positions}: "
                "shorten the sequence, or build it with a larger context"
            )
        lowered = lower(Causal() if mask is None else mask, queries, keys, device)
        # The residual stream keeps the dtype of the weights, also where autocast narrows what flows into it.
        x = self.embed(latents.to(self.embed.weight.dtype)).to(self.norm.weight.dtype) + self.level_embedding(level)
        if own is not None:
            x = x + own.unsqueeze(-1) * self.own_role
        if estimate is not None:
            if self.estimate_embed is None:
                raise ValueError("this Transformer takes no estimate; build it with self_conditioning=True")
            # A realised token is known; nothing is estimated of it.
            estimate = torch.where((level > 0).unsqueeze(-1), estimate, 0.0).to(self.estimate_embed.weight.dtype)
            x = x + self.estimate_embed(estimate)
        angles = rotary_angles(as_positions(queries, device), self.head_dim, self.rope_base, level.dtype).unsqueeze(1)
        rotation = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, lowered, cache, layer, store)
        if cache is not None and store:
            cache.advance(count)
        return self.norm(x)
