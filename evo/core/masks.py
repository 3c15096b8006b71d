"""Who may look at whom: attention masks as small objects.

A mask is defined by `allowed`, a predicate on positions, and nothing else. Positions count from the beginning of each
sequence (0 is BOS); a negative position is padding on the left, which nobody sees. `lower` turns a mask into what
`scaled_dot_product_attention` takes, and finds the cases that need no matrix at all.

B batch, Q queries, K keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Mask(ABC):
    """Which keys each query may attend to."""

    @abstractmethod
    def allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions (B or 1, Q) and (B or 1, K) -> bool (B or 1, Q, K), True where the query sees the key."""

    @abstractmethod
    def is_full(self, start: int, count: int, keys: int) -> bool:
        """Whether queries at start..start+count-1 all see every key at 0..keys-1 (all sequences alike)."""


@dataclass(frozen=True)
class Causal(Mask):
    """A position sees itself and everything before it."""

    def allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        queries, keys = queries.unsqueeze(-1), keys.unsqueeze(-2)
        return keys <= queries

    def is_full(self, start: int, count: int, keys: int) -> bool:
        return count == 1 and keys == start + 1


@dataclass(frozen=True, eq=False)
class Window(Mask):
    """A causal prompt, followed by a window in which everybody sees the prompt and the whole window.

    Args:
        prompt: how many leading positions (BOS included) are prompt: int, or (B,) where sequences differ. The prompt never
            sees the window, so its keys and values can be computed once.
        length: how many positions are there at all: int, (B,), or None for no limit. Later ones are seen by nobody.
    """

    prompt: int | Tensor
    length: int | Tensor | None = None

    def allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        queries, keys = queries.unsqueeze(-1), keys.unsqueeze(-2)
        prompt = _per_sequence(self.prompt)
        seen = (keys <= queries) | ((queries >= prompt) & (keys >= prompt))
        return seen if self.length is None else seen & (keys < _per_sequence(self.length))

    def is_full(self, start: int, count: int, keys: int) -> bool:
        prompt, length = self.prompt, self.length
        if isinstance(prompt, Tensor) or isinstance(length, Tensor):
            return False
        return start >= prompt and keys == start + count and (length is None or keys <= length)


def _per_sequence(value: int | Tensor) -> int | Tensor:
    return value[:, None, None] if isinstance(value, Tensor) else value


class Lowered(NamedTuple):
    """A mask as `scaled_dot_product_attention` takes it."""

    matrix: Tensor | None
    causal: bool


def lower(mask: Mask, queries: Tensor | range, keys: Tensor | range, device: torch.device) -> Lowered:
    """A mask over queries and keys, given as a range where all sequences agree and as positions (B, ·) where they do not.

    Every query is let see itself, padding too: a row without any key would be NaN, and NaN spreads even through weights of zero.
    """
    if isinstance(queries, range) and isinstance(keys, range):
        if mask.is_full(queries.start, len(queries), len(keys)):
            return Lowered(None, False)
        if isinstance(mask, Causal) and queries == keys:
            return Lowered(None, True)
    query_positions, key_positions = as_positions(queries, device), as_positions(keys, device)
    seen = mask.allowed(query_positions, key_positions) & (key_positions >= 0).unsqueeze(-2)
    own_slot = torch.arange(len(keys) if isinstance(keys, range) else keys.shape[1], device=device)
    first = own_slot.numel() - (len(queries) if isinstance(queries, range) else queries.shape[1])
    itself = own_slot == own_slot[first:, None]
    return Lowered((seen | itself).unsqueeze(1), False)


def as_positions(positions: Tensor | range, device: torch.device) -> Tensor:
    """A range as a (1, n) tensor; a tensor as it is."""
    if isinstance(positions, range):
        return torch.arange(positions.start, positions.stop, device=device).unsqueeze(0)
    return positions
