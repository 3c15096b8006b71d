"""Multi-head attention with rotary positions, grouped keys and values, and a cache.

B batch, N tokens, W width, C head dimension.
"""

from __future__ import annotations

from torch import Tensor, nn

from evo.core.backends.base import Attend, needs_gradient
from evo.core.cache import Cache
from evo.core.layers import LayerNorm, RMSNorm
from evo.core.packing import PackedAttend, PackedCache
from evo.core.rotary import rotate
from evo.core.section import SectionAttend


class Attention(nn.Module):
    """Attention of a sequence to itself and to what a cache holds of it.

    Args:
        width: W.
        heads: number of query heads.
        kv_heads: number of key and value heads, a divisor of heads; None is as many as heads.
        head_dim: C; None is width / heads, which must then be whole.
        bias: whether queries, keys and values have one.
        out_bias: whether the output has one.
        qk_norm: of every head of queries and keys, before they are turned (Qwen3); None is none.
        dropout: of attention weights, in training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm: RMSNorm | LayerNorm | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads or (head_dim is None and width % heads):
            raise ValueError(
                f"width {width}, heads {heads}, kv_heads {kv_heads}: heads must be a multiple of kv_heads, "
                "and width one of heads where no head_dim is given"
            )
        head_dim = width // heads if head_dim is None else head_dim
        self.heads, self.kv_heads, self.head_dim, self.dropout = heads, kv_heads, head_dim, dropout
        self.q = nn.Linear(width, heads * head_dim, bias=bias)
        self.k = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, width, bias=out_bias)
        self.q_norm = None if qk_norm is None else qk_norm.build(head_dim)
        self.k_norm = None if qk_norm is None else qk_norm.build(head_dim)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        attend: Attend | PackedAttend | SectionAttend,
        cache: Cache | PackedCache | None = None,
        layer: int = 0,
        store: bool = False,
    ) -> Tensor:
        """(B, N, W) -> (B, N, W).

        `rotation` is that of a `RotaryTable`; None turns nothing. With a cache the N tokens stand where the pattern of `attend` says,
        and see what is stored; `store` keeps their own keys and values too (the caller advances the cache when all layers have run).
        """
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.q(x).view(shape), self.k(x).view(shape), self.v(x).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            # Autocast narrows what comes out of a product; a norm computes in the precision of its weights.
            q, k = self.q_norm(q.to(self.q_norm.weight.dtype)), self.k_norm(k.to(self.k_norm.weight.dtype))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        # Under autocast norms and rotations come back wider than the values; kernels want one dtype.
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            new, gradient = (k, v, attend.pattern.queries, attend.pattern.keys), needs_gradient(q, k, v)
            if store or not gradient:
                # Also what is not to be kept is put behind what is, where the next pass overwrites it: that saves a copy of the whole.
                k, v = cache.write(layer, *new)
            if gradient:
                # What is stored carries no gradient, and is overwritten before a backward could read it.
                k, v = cache.join(layer, *new)
        mixed = attend(q, k, v, self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))
