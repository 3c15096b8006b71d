"""The backbone: a Transformer that is told, token by token, how noisy its input is.

B batch, N tokens, D latent dimension, W width, F hidden width of the feed-forward layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from evo.core.attention import Attention
from evo.core.backends import Attend, Backend, auto
from evo.core.cache import Cache
from evo.core.layers import GELU, LayerNorm, RMSNorm, SwiGLU, default_hidden
from evo.core.masks import Causal, Mask
from evo.core.packing import PackedAttend, PackedCache, Packing
from evo.core.pattern import Pattern
from evo.core.relay import Relay
from evo.core.rotary import Rotary, RotaryTable
from evo.core.section import Divide, SectionAttend


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


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self,
        width: int,
        hidden: int,
        attention: Attention,
        norm: RMSNorm | LayerNorm,
        feed_forward: SwiGLU | GELU,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm = norm.build(width)
        self.attention = attention
        self.feed_forward_norm = norm.build(width)
        self.feed_forward = feed_forward.build(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        attend: Attend | PackedAttend | SectionAttend,
        cache: Cache | PackedCache | None,
        layer: int,
        store: bool,
    ) -> Tensor:
        """(B, N, W) -> (B, N, W); the further arguments are those of `Attention`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, attend, cache, layer, store))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """Latents and their levels in, hidden states out.

    Args:
        dim: D, of the latents.
        width: W.
        depth: number of blocks.
        heads, kv_heads: query heads and key/value heads; None is as many.
        head_dim: of each head; None is width / heads.
        hidden: F; None is 8/3 W rounded up to a multiple of 64.
        positions: how many positions there are; an attended BOS takes one.
        dropout: on both residual branches.
        attention_dropout: of attention weights.
        attention: computes it; `model.backbone.attention = Xformers()` exchanges it later.
        norm: the kind of every norm.
        feed_forward: the kind of the feed-forward layers.
        rotary: frequencies of rotary positions; None is a learned embedding of each position, added to the input (GPT-2).
        qkv_bias, out_bias: whether those maps of attention have one.
        qk_norm: whether the heads of queries and keys are normalised.
        embed: module that maps latents (B, N, D) to (B, N, W); None is a linear map.
        self_conditioning: take an earlier estimate of the clean latents as a second input.

    Attributes:
        divide: which positions of a pass without a cache are computed here, where others compute the rest; None is all of them.
        relay: takes a pass through blocks that lie in other processes too, and are not among `blocks`; None is none.
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
        head_dim: int | None = None,
        hidden: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        attention: Backend = auto,
        norm: RMSNorm | LayerNorm = RMSNorm(),
        feed_forward: SwiGLU | GELU = SwiGLU(),
        rotary: Rotary | None = Rotary(),
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        embed: nn.Module | None = None,
        self_conditioning: bool = False,
    ) -> None:
        super().__init__()
        hidden = default_hidden(width) if hidden is None else hidden
        self.dim, self.width, self.positions = dim, width, positions
        self.attention = attention
        self.divide: Divide | None = None
        self.relay: Relay | None = None
        self.embed = nn.Linear(dim, width, bias=False) if embed is None else embed
        self.estimate_embed = nn.Linear(dim, width, bias=False) if self_conditioning else None
        self.level_embedding = LevelEmbedding(width)
        # The embedding of role `next` is zero by construction, which leaves a causal model untouched; this is role `own`.
        self.own_role = nn.Parameter(torch.zeros(width))
        blocks = []
        for _ in range(depth):
            heads_of_block = Attention(
                width,
                heads,
                kv_heads,
                head_dim=head_dim,
                bias=qkv_bias,
                out_bias=out_bias,
                qk_norm=norm if qk_norm else None,
                dropout=attention_dropout,
            )
            blocks.append(Block(width, hidden, heads_of_block, norm, feed_forward, dropout))
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm.build(width)
        self.rotary = None if rotary is None else RotaryTable(rotary, head_dim or width // heads)
        self.position_embedding = nn.Embedding(positions, width) if rotary is None else None
        self._initialise()

    @property
    def self_conditioned(self) -> bool:
        """Whether there is an input for an earlier estimate of the clean latents."""
        return self.estimate_embed is not None

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding.weight, std=0.02)
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
        packing: Packing | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Latents (B, N, D) at levels (B, N) -> hidden states (B, N, W).

        Args:
            mask: who sees whom; None is `Causal()`.
            own: bool (N,) or (B, N), True where a position speaks of its own token, False where of the next; None is nowhere.
            estimate: (B, N, D) what an earlier evaluation took the clean latents for (self-conditioning, Chen et al. 2022); None is
                nothing, and nothing is taken of it where the level is 0.
            cache: keys and values of earlier positions, seen by these, which stand behind them.
            store: add the keys and values of these positions to the cache.
            packing: (B, N) is then (1, T), tokens from anywhere in sequences of the cache, which see their whole sequence and
                overwrite their slots; `mask` stays None, `store` False.
            positions: (B, N) int64 where the tokens stand, none beyond the last position; None is where the cache says, and without one
                the order they are given in. To a mask that order is all there is.

        Raises:
            ValueError: if the tokens reach past the last position, for an estimate that this network has no input for, or for a
                packing without a cache or with what it excludes.
        """
        count = latents.shape[1]
        section = None
        if packing is not None:
            if cache is None or mask is not None or store:
                raise ValueError(
                    "packed tokens need a cache, and take neither mask nor store: their packing says whom they see"
                )
            keys = packing.keys
        else:
            keys = count if cache is None else cache.length + count
        if keys > self.positions and positions is None and (cache is None or cache.shift is None):
            raise ValueError(
                f"{keys} positions do not fit this model's {self.positions}: "
                "shorten the sequence, or build it with a larger context"
            )
        if packing is not None and cache is not None:
            attend, memory, slots = packing.attend(self.attention), packing.over(cache), packing.slots.unsqueeze(0)
        else:
            start = 0 if cache is None else cache.next_slots(count)
            if cache is None and self.divide is not None:
                section = self.divide(count)
            if section is not None:
                start, count, rows = section.start, section.count, section.rows
                latents, level = latents[:, rows], level[:, rows]
                own = None if own is None else own[..., rows]
                estimate = None if estimate is None else estimate[:, rows]
                positions = None if positions is None else positions[:, rows]
            pattern = Pattern(
                mask=Causal() if mask is None else mask,
                queries=start,
                count=count,
                keys=keys,
                batch=len(latents),
                device=latents.device,
                ends=None if cache is None else cache.ends(count),
            )
            attend = Attend(self.attention, pattern) if section is None else section.attend(self.attention, pattern)
            memory, slots = cache, pattern.positions
        if positions is None:
            positions = (
                slots if cache is None else cache.positions(slots, None if packing is None else packing.sequence)
            )
        # The residual stream keeps the dtype of the weights, also where autocast narrows what flows into it.
        dtype = self.norm.weight.dtype
        x = self.embed(latents.to(dtype)).to(dtype) + self.level_embedding(level)
        if own is not None:
            x = x + own.unsqueeze(-1) * self.own_role
        if estimate is not None:
            if self.estimate_embed is None:
                raise ValueError("this Transformer takes no estimate; build it with self_conditioning=True")
            # A realised token is known; nothing is estimated of it.
            estimate = torch.where((level > 0).unsqueeze(-1), estimate, 0.0).to(self.estimate_embed.weight.dtype)
            x = x + self.estimate_embed(estimate)
        rotation = None
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.rotary is not None:
            rotation = self.rotary(positions, level.dtype, x.dtype)

        def through(x: Tensor, rows: slice | None) -> Tensor:
            turned, seen = rotation, attend
            if rows is not None:
                assert not isinstance(seen, PackedAttend)  # tokens of several sequences pass together
                turned, seen = None if rotation is None else _take(rotation, rows), seen.take(rows)
            for layer, block in enumerate(self.blocks):
                x = block(x, turned, seen, memory, layer, store)
            return x

        x = through(x, None) if self.relay is None else self.relay(x, through, whole=cache is not None)
        if cache is not None and store:
            cache.advance(count)
        x = self.norm(x)
        return x if section is None else section.gather(x)


def _take(rotation: tuple[Tensor, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    """The rotation of these sequences; one for all of them stays as it is."""
    cos, sin = rotation
    return (cos, sin) if len(cos) == 1 else (cos[rows], sin[rows])
