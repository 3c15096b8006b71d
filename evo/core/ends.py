"""Where sequences end: their stop tokens, the fewest and the most tokens of each.

B batch, S stop tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Where each sequence of a batch ends. The host decides that, so the host knows it.

    Attributes:
        most: of each sequence, the tokens after which it ends in any case.
        fewest: of each, the tokens that it has at least, a stop token included.
        stop: of each, the ids that end it; the first of them is what stands behind its end.
    """

    most: tuple[int, ...]
    fewest: tuple[int, ...]
    stop: tuple[tuple[int, ...], ...]

    def take(self, rows: Sequence[int]) -> Ends:
        """Those of the given sequences."""
        return Ends(
            most=tuple(self.most[row] for row in rows),
            fewest=tuple(self.fewest[row] for row in rows),
            stop=tuple(self.stop[row] for row in rows),
        )

    def end(self, row: int, start: int, tokens: Sequence[int], final: Sequence[bool] | None = None) -> int | None:
        """How many of the tokens that stand at `start` and behind it a sequence keeps; None if it goes on.

        Only a token that is `final` (None: all of them) can end it; one that is not may yet become something else.
        """
        stop, most = self.stop[row], self.most[row] - start
        for index, token in enumerate(tokens):
            if index + 1 >= most or (token in stop and (final is None or final[index])):
                return index + 1
        return None

    def banned(self, start: int, device: torch.device) -> Banned | None:
        """What may not come at `start` and behind it; None if everything may."""
        early = [fewest - 1 - start for fewest, stop in zip(self.fewest, self.stop, strict=True) if stop]
        if max(early, default=0) <= 0:
            return None
        width = max(map(len, self.stop))
        # A shorter set repeats its first id; where there is none, nothing is early and any id will do.
        ids = [(stop or (0,)) + (stop or (0,))[:1] * (width - len(stop or (0,))) for stop in self.stop]
        before = [fewest - 1 - start if stop else 0 for fewest, stop in zip(self.fewest, self.stop, strict=True)]
        return Banned(ids=torch.tensor(ids, device=device), before=torch.tensor(before, device=device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Banned:
    """Ids that may not come at the first positions of a window.

    Attributes:
        ids: (B, S) int64.
        before: (B,) the position from which on they may.
    """

    ids: Tensor
    before: Tensor

    def __call__(self, logits: Tensor, sequence: Tensor, index: int | Tensor) -> Tensor:
        """Logits (..., V) of tokens of sequences int64 (...) at positions int or (...) of the window, with -inf where an id may not come.

        Sequences and positions need only broadcast to the shape (...) of the tokens.
        """
        early, ids = (index < self.before[sequence]).unsqueeze(-1), self.ids[sequence]
        ids = ids.expand(*logits.shape[:-1], -1)
        return logits.scatter(-1, ids, logits.gather(-1, ids).masked_fill(early, -torch.inf))

    def take(self, rows: Tensor) -> Banned:
        """That of the given sequences, (R,) int64."""
        return Banned(ids=self.ids[rows], before=self.before[rows])
