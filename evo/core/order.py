"""In which order a sequence is read where there is clean context on both sides of a window.

    prefix · suffix · the last row before the window once more · window

Whoever reads in this order, each row seeing those before it, sees exactly what it may: the prefix itself alone, the suffix the prefix
too, the window both. The row that is read twice is the one that speaks of the window's first token: as part of the prefix it has not
seen the suffix, and on its second reading it has. Positions stay those of the text. So a causal mask and a window mask are all that is
needed, and what was read of prefix and suffix does not depend on the window, which a cache wants.

B batch, N tokens, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Order:
    """The order of a batch. A row is a token's place in the text, counted from an attended BOS if there is one; a slot is its place here.

    Attributes:
        rows: (B, S) int64, the row read in each slot, which is its position too; S is one more than there are rows.
        slots: (B, N) int64, the slot in which each token is read (its own row, not the repeated one).
        speakers: (B, N) int64, the slot before each token, which speaks of it under a causal mask; -1 is a detached BOS.
        window: (B,) int64, the slot at which the window begins.
        end: (B,) int64, slots that are not padding.
        suffix: (B,) int64, how many of the tokens present, the last ones, are suffix.
    """

    rows: Tensor
    slots: Tensor
    speakers: Tensor
    window: Tensor
    end: Tensor
    suffix: Tensor

    @classmethod
    def of(cls, size: int, bos: int, prompt: Tensor, end: Tensor, suffix: Tensor) -> Order:
        """The order of sequences of `size` tokens, right-padded.

        Args:
            size: N.
            bos: 1 if there is an attended BOS, else 0.
            prompt, end, suffix: (B,) int64, leading tokens that are prompt, tokens present, and how many of these, the last ones, are
                suffix. Where it is 0 the text is read as it stands.
        """
        prompt, suffix = (prompt + bos)[:, None], suffix[:, None]
        stop = end[:, None] + bos - suffix
        again = is_repeated(prompt, suffix)
        late = suffix + again
        slot, row = (torch.arange(size + bos + extra, device=prompt.device) for extra in (1, 0))
        rows = torch.where(slot < prompt + late, slot + (stop - prompt), slot - late)
        rows = torch.where((again == 1) & (slot == prompt + suffix), prompt - 1, rows)
        rows = torch.where(slot < prompt, slot, rows).clamp(max=size + bos - 1)
        slots = torch.where(row < stop + suffix, row - (stop - prompt), row + again)
        slots = torch.where(row < stop, row + late, slots)
        slots = torch.where(row < prompt, row, slots)[:, bos:]
        # Where nothing precedes the window, its first token stands behind the suffix, and only a detached BOS speaks of it.
        nobody = (prompt == 0) & (row[bos:] == 0)
        return cls(
            rows=rows,
            slots=slots,
            speakers=torch.where(nobody, -1, slots - 1),
            window=(prompt + late)[:, 0],
            end=(stop + late)[:, 0],
            suffix=suffix[:, 0],
        )

    def take(self, rows: Tensor | slice) -> Order:
        """That of the given sequences."""
        return Order(**{each.name: getattr(self, each.name)[rows] for each in fields(self)})


def is_repeated(prompt: Tensor, suffix: Tensor) -> Tensor:
    """How often the last row before the window is read again, int64 0 or 1: where there is one, and a suffix that it has not seen."""
    return ((prompt > 0) & (suffix > 0)).long()


def gathered(x: Tensor, places: Tensor) -> Tensor:
    """Of (B, N, ...), what stands at these places (B, M): (B, M, ...)."""
    index = places.view(*places.shape, *(1,) * (x.dim() - 2))
    return torch.take_along_dim(x, index, dim=1)
