"""Some tokens of a batch, computed in one pass without padding.

T tokens of S sequences lie one behind another in a single row, so that linear maps touch these tokens and no others. Attention alone
needs to know whose they are: there queries are laid out a sequence a row, as many as the sequence with most of them has.

B batch, S sequences of it, T packed tokens, Q tokens of the fullest sequence, K keys, H heads, G key/value heads, C head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from evo.core.backends import Backend
from evo.core.cache import Cache
from evo.core.masks import Window
from evo.core.pattern import Pattern


@dataclass(frozen=True, eq=False, kw_only=True)
class Packing:
    """Whose the tokens of a packed pass are, and where they stand.

    Every token sees all that its sequence has, up to the sequence's end: what the pass computes, and what a cache holds of the others.

    Args:
        batch: B, sequences of the cache.
        rows: (S,) int64, which of them have tokens here, in rising order; None is all.
        sequence: (T,) int64, the sequence of each token, in rising order.
        slots: (T,) int64, its position in that sequence.
        queries: (T,) int64, its place in a (S, Q) array, row by row; None where every sequence has Q tokens.
        count: Q.
        ends: the length of each of the S sequences, known on the host.
        block: where the tokens are Q consecutive ones of every sequence of the batch, all from the same slot, that slot; else None.
    """

    batch: int
    rows: Tensor | None
    sequence: Tensor
    slots: Tensor
    queries: Tensor | None
    count: int
    ends: tuple[int, ...]
    block: int | None = None

    @property
    def keys(self) -> int:
        """K, the length of the longest sequence."""
        return max(self.ends)

    @cached_property
    def _pattern(self) -> Pattern:
        # In a window nobody's view depends on where they stand; and if sequences end alike, there is no mask at all.
        device, alike = self.slots.device, min(self.ends) == self.keys
        return Pattern(
            mask=Window(0),
            queries=0 if alike else torch.arange(self.count, device=device).expand(len(self.ends), -1),
            count=self.count,
            keys=self.keys,
            batch=len(self.ends),
            device=device,
            ends=None if alike else self.ends,
        )

    def attend(self, backend: Backend) -> PackedAttend:
        """What the layers call in place of `Attend`."""
        return PackedAttend(backend, self._pattern, self.queries)

    def over(self, cache: Cache) -> PackedCache:
        """What the layers write to in place of the cache."""
        return PackedCache(cache, self)


@dataclass(frozen=True, eq=False)
class PackedAttend:
    """A backend, and how packed queries are laid out for it."""

    backend: Backend
    pattern: Pattern
    queries: Tensor | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Queries (1, H, T, C), keys and values (S, G, K, C) -> (1, H, T, C)."""
        sequences, count = self.pattern.batch, self.pattern.count
        flat = q[0].transpose(0, 1)
        if self.queries is not None:
            # Zeros see something finite, and nobody reads what they make of it.
            flat = q.new_zeros(sequences * count, *flat.shape[1:]).index_copy(0, self.queries, flat)
        mixed = self.backend(flat.unflatten(0, (sequences, count)).transpose(1, 2), k, v, self.pattern, dropout)
        mixed = mixed.transpose(1, 2).flatten(0, 1)
        if self.queries is not None:
            mixed = mixed.index_select(0, self.queries)
        return mixed.transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True, eq=False)
class PackedCache:
    """A cache, as the layers of a packed pass write to it: behind what it holds, and never counted as stored."""

    cache: Cache
    packing: Packing

    def write(self, layer: int, keys: Tensor, values: Tensor, at: int | Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Put keys and values (1, G, T, C) in their slots, and return those of the first `slots` slots of every row, (S, G, K, C)."""
        packing = self.packing
        if packing.block is not None:
            # Slices are written faster than slots.
            shape = (packing.batch, packing.count)
            keys, values = (new[0].unflatten(1, shape).transpose(0, 1) for new in (keys, values))
            return self.cache.write(layer, keys, values, packing.block, slots)
        return self.cache.scatter(
            layer, keys[0], values[0], packing.sequence, packing.slots, slots, packing.batch, packing.rows
        )

    def join(self, layer: int, keys: Tensor, values: Tensor, at: int | Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Raises ValueError: what a cache holds carries no gradient, and a packed pass is for whoever needs none."""
        raise ValueError("a packed pass carries no gradient; run it under torch.no_grad()")
