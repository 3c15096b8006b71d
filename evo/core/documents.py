"""Several documents in one sequence, each treated as if it were alone.

BOS stands once, before all of them, and every document sees it. Positions count from the beginning of each document, so that BOS is as
far from a document's first token as if nothing stood between them, and it is BOS that speaks of that token. Hence hidden states are
those of the documents alone, in both halves and exactly.

B batch, N tokens, S slots of the order of reading, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from evo.core.masks import Document, Leading, Mask
from evo.core.order import Order, is_repeated


@dataclass(frozen=True, eq=False, kw_only=True)
class Documents:
    """Which document each token of a batch belongs to.

    Attributes:
        number: (B, N) int64, of each token's document in its sequence, from 0.
        begin: bool (B, N), whether a token is the first of its document.
        places: (B, N) int64, of each token in its document, from 0.
        ids: (B, S) int64, to which document each slot belongs: BOS, if it is attended, and the tokens, or those of an `Order`.
        positions: (B, S) int64, where each slot stands: BOS at 0, a document's tokens behind it.
        bos: positions that BOS takes, 0 or 1.
    """

    number: Tensor
    begin: Tensor
    places: Tensor
    ids: Tensor
    positions: Tensor
    bos: int

    @classmethod
    def of(cls, ids: Tensor, bos: int) -> Documents:
        """From ids (B, N): a document begins with a sequence, and wherever its id is not that of the token before."""
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        begin = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
        number = begin.cumsum(1) - 1
        places = index - torch.where(begin, index, 0).cummax(1).values
        return cls(
            number=number,
            begin=begin,
            places=places,
            ids=F.pad(number, (bos, 0)),
            positions=F.pad(places + bos, (bos, 0)),
            bos=bos,
        )

    def read_in(self, order: Order, prompt: Tensor) -> tuple[Documents, Order]:
        """These documents, and an order, made for each other. `prompt` (B,) is how many leading tokens are prompt.

        The row that an order reads twice is for the document that goes on from the window into the suffix: its last row before the window,
        or BOS, if it begins in the window. Without such a document nobody sees the second reading, and nothing is spoken by it.
        """
        last = self.number.shape[1] - 1
        index = torch.arange(last + 1, device=prompt.device)
        slot = torch.arange(order.rows.shape[1], device=prompt.device)
        suffix, prompt = order.suffix[:, None], prompt[:, None]
        # `end` counts slots, of which the order has one more than tokens and BOS where a row is read again.
        again = is_repeated(prompt + self.bos, suffix)
        stop = order.end[:, None] - again - self.bos - suffix
        behind = stop.clamp(max=last)
        cut = self.number.gather(1, behind)
        first = behind - self.places.gather(1, behind)
        goes_on = (suffix > 0) & (stop > prompt) & (first < stop)
        within = first >= prompt
        served = goes_on & ~(within & (self.bos == 0))
        twice = (again == 1) & (slot == order.window[:, None] - 1)

        rows = torch.where(twice & served & within, 0, order.rows)
        ids = torch.where(twice, torch.where(served, cut, -1), self.ids.gather(1, rows))
        before = F.pad(order.slots[:, :-1], (1, 0))
        speakers = torch.where(self.begin, self.bos - 1, before)
        speakers = torch.where(served & (index == torch.maximum(prompt, first)), order.window[:, None] - 1, speakers)
        speakers = torch.where(index < stop, speakers, order.speakers)
        return (
            replace(self, ids=ids, positions=self.positions.gather(1, rows)),
            replace(order, rows=rows, speakers=speakers),
        )

    def take(self, rows: Tensor | slice) -> Documents:
        """Those of the given sequences."""
        held = {each.name: getattr(self, each.name) for each in fields(self)}
        return Documents(**{name: each if name == "bos" else each[rows] for name, each in held.items()})

    def mask(self, among: Mask) -> Mask:
        """What `among` allows within each document, and BOS."""
        own = Document(self.ids)
        return among & (own | Leading(self.bos)) if self.bos else among & own

    def spoken(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, N, W) that speak of each token, from those of a shifted pass, in which a document's last row speaks of the next
        document's first token: what speaks of the sequence's first token speaks of every document's.
        """
        return torch.where(self.begin.unsqueeze(-1), hidden[:, :1], hidden)
