"""Multi-head attention with rotary positions, grouped keys and values, and a cache.

B batch, N tokens, W width, H heads, C head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from evo.core.cache import Cache
from evo.core.masks import Lowered


class Attention(nn.Module):
    """Attention of a sequence to itself and to what a cache holds of it.

    Args:
        width: W, a multiple of heads.
        heads: number of query heads.
        kv_heads: number of key and value heads, a divisor of heads; None is as many as heads.
    """

    def __init__(self, width: int, heads: int, kv_heads: int | None = None) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if width % heads or heads % kv_heads or (width // heads) % 2:
            raise ValueError(
                f"width {width}, heads {heads}, kv_heads {kv_heads}: width must be an even multiple of heads, heads a multiple of kv_heads"
            )
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Lowered,
        cache: Cache | None = None,
        layer: int = 0,
        store: bool = False,
    ) -> Tensor:
        """(B, N, W) -> (B, N, W).

        With a cache the N tokens stand behind the cached ones and see them; `store` keeps their own keys and values there too
        (the caller advances the cache when all layers have run).
        """
        q = rotate(rearrange(self.q(x), "b n (h c) -> b h n c", h=self.heads), rotation)
        k = rotate(rearrange(self.k(x), "b n (h c) -> b h n c", h=self.kv_heads), rotation)
        v = rearrange(self.v(x), "b n (h c) -> b h n c", h=self.kv_heads)
        if cache is not None and store:
            k, v = cache.write(layer, k, v)
        elif cache is not None and cache.length:
            past_k, past_v = cache.read(layer)
            k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.matrix, is_causal=mask.causal, enable_gqa=self.kv_heads != self.heads
        )
        return self.out(rearrange(mixed, "b h n c -> b n (h c)"))


def rotary_angles(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """Angles of the rotary embedding (Su et al. 2021) at positions (...), float32 or wider: (..., head_dim / 2).

    Made anew each time: a buffer would follow the weights into bfloat16, in which positions beyond 256 are no longer distinct.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    return positions.clamp(min=0).to(dtype).unsqueeze(-1) * torch.pow(base, -exponents)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the two halves of every head, (B, H, N, C), by cosines and sines that broadcast to (B, 1, N, C/2)."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
