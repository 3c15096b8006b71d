"""A pass whose blocks lie in several processes, one behind another.

B batch, N tokens, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from torch import Tensor

Through: TypeAlias = Callable[[Tensor, "slice | None"], Tensor]
"""From what enters the blocks that are here, (b, N, W) of the given sequences of the batch (None is all), to what leaves them."""


class Relay(Protocol):
    """Takes a pass through the blocks of all processes."""

    def __call__(self, x: Tensor, through: Through, *, whole: bool) -> Tensor:
        """What enters the first block of all, (B, N, W) -> what leaves the last, (B, N, W), on every process.

        All processes call it with the same arguments, as often and in the same order.

        Args:
            through: the blocks that are here.
            whole: whether all sequences must pass together.
        """
        ...
