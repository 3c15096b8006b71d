"""A pass of which every process computes some positions, and nobody all.

B batch, n positions of the section, N of the whole, H query heads, G key/value heads, C head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from evo.core.backends import Backend
from evo.core.pattern import Pattern


@dataclass(frozen=True, eq=False, kw_only=True)
class Section:
    """Consecutive positions of every sequence, in a pass whose other positions are computed elsewhere at the same time.

    Attributes:
        start: the first of them.
        count: n, at least 1.
        gather: features (..., n, C) of these positions -> (..., N, C) of all, in order, with a gradient. Whoever computes a part of the
            pass calls it at the same points: once in each layer, and once for what the pass returns.
    """

    start: int
    count: int
    gather: Callable[[Tensor], Tensor]

    @property
    def rows(self) -> slice:
        """These positions of the whole."""
        return slice(self.start, self.start + self.count)

    def attend(self, backend: Backend, pattern: Pattern) -> SectionAttend:
        """What the layers call in place of `Attend`."""
        return SectionAttend(backend, pattern, self.gather)


Divide: TypeAlias = Callable[[int], "Section | None"]
"""From N to the section that is computed here; None to compute all of it everywhere."""


@dataclass(frozen=True, eq=False)
class SectionAttend:
    """A backend, the pattern of a section's queries over all keys, and where the keys and values of other positions come from."""

    backend: Backend
    pattern: Pattern
    gather: Callable[[Tensor], Tensor]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Queries (B, H, n, C), keys and values (B, G, n, C) of the section -> (B, H, n, C)."""
        keys, values = self.gather(torch.stack([k, v])).unbind(0)
        return self.backend(q, keys, values, self.pattern, dropout)

    def take(self, rows: slice) -> SectionAttend:
        """The same for these sequences of the batch alone."""
        return SectionAttend(self.backend, self.pattern.take(rows), self.gather)
