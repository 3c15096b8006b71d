"""Single levels tried at their other end, where the gradient of the bound has nothing to say of it.

B batch, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """Levels of which one a sequence has been moved to the end that is farther away.

    One alone: of several, each would be charged with what the others cost.

    Attributes:
        levels: (B, N).
        moved: bool (B, N), which of them were.
    """

    levels: Tensor
    moved: Tensor

    @classmethod
    def of(cls, levels: Tensor, free: Tensor, u: Tensor) -> Trial:
        """Move the token of least u, (B, N) in [0, 1), among those of each sequence that are `free`, bool (B, N)."""
        least = torch.where(free, u, 2.0).argmin(1, keepdim=True)
        moved = free & (torch.arange(free.shape[1], device=free.device) == least)
        return cls(levels=torch.where(moved, (levels < 0.5).to(levels.dtype), levels), moved=moved)

    def slope(self, beyond: Tensor) -> Tensor:
        """What is to be had by lowering each level: nats, (B, N).

        It is what moving it cost, with the sign of the way it went; 0 of the others.

        `beyond`, (B,), is what each sequence costs at these levels beyond what it did before, in nats.
        """
        return torch.where(self.moved, torch.where(self.levels > 0.5, 1, -1) * beyond.unsqueeze(1), 0.0)
