"""Single levels tried at their other end, where the gradient of the bound has nothing to say of it.

B batch, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Of a sequence's tokens, at least one. Those that are tried together share what comes of it.
_SHARE = 1 / 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """Levels of which a few have been moved to the end that is farther away.

    Attributes:
        levels: (B, N).
        moved: bool (B, N), which of them were.
    """

    levels: Tensor
    moved: Tensor

    @classmethod
    def of(cls, levels: Tensor, free: Tensor, u: Tensor) -> Trial:
        """Move a sixteenth of the tokens that are `free`, bool (B, N), and at least one of each sequence.

        They are those of the least u, (B, N) in [0, 1).
        """
        count = (free.sum(1, keepdim=True) * _SHARE).round().clamp(min=1)
        moved = free & (torch.where(free, u, 2.0).argsort(1).argsort(1) < count)
        return cls(levels=torch.where(moved, (levels < 0.5).to(levels.dtype), levels), moved=moved)

    def slope(self, beyond: Tensor) -> Tensor:
        """What is to be had by lowering each level: nats, (B, N).

        It is what moving it cost, shared by those of a sequence that were moved, with the sign of the way they went; 0 of the others.

        `beyond`, (B,), is what each sequence costs at these levels beyond what it did before, in nats.
        """
        share = beyond / self.moved.sum(1).clamp(min=1)
        return torch.where(self.moved, torch.where(self.levels > 0.5, 1, -1) * share.unsqueeze(1), 0.0)
