"""A mask laid over the queries and keys of one pass, and the forms that attention kernels take it in.

B batch, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor

from evo.core.masks import Mask, Piece, Rows

T = TypeVar("T")


@dataclass(frozen=True, eq=False, kw_only=True)
class Pattern:
    """Who sees whom in one pass. Keys are positions 0..K-1 of each sequence; the forms made of it are made once, for all layers.

    Every query sees itself, whatever the mask says: a row without any key would be NaN, and NaN spreads even through weights of zero.

    Args:
        mask: who may see whom.
        queries: the position of the first query, int, where queries follow one another and all sequences agree; else the positions
            of all of them, int64 (B, Q).
        count: Q.
        keys: K.
        batch: B.
        device: where attention is computed.
        ends: where the queries are the last positions of sequences of different lengths, those lengths, known on the host: later keys
            are nobody's. None elsewhere; a mask must then say itself what is absent.

    Raises:
        ValueError: if the mask does not fit so many sequences or positions.
    """

    mask: Mask
    queries: int | Tensor
    count: int
    keys: int
    batch: int
    device: torch.device
    ends: tuple[int, ...] | None = None
    _made: dict[object, object] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.mask.check(self.batch, self.keys)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returned when first asked for under this key."""
        if key not in self._made:
            self._made[key] = make()
        return cast("T", self._made[key])

    def take(self, rows: slice) -> Pattern:
        """The pattern of these sequences, which follow one another in the batch: `slice(first, stop)`."""
        return Pattern(
            mask=Rows(self.mask, rows.start) if self.mask.per_sequence else self.mask,
            queries=self.queries[rows] if isinstance(self.queries, Tensor) and len(self.queries) > 1 else self.queries,
            count=self.count,
            keys=self.keys,
            batch=rows.stop - rows.start,
            device=self.device,
            ends=None if self.ends is None else self.ends[rows],
        )

    @property
    def positions(self) -> Tensor:
        """Of the queries, (1 or B, Q)."""
        if isinstance(self.queries, Tensor):
            return self.queries
        return self.once("positions", partial(_consecutive, self.queries, self.count, self.device))

    @property
    def pieces(self) -> tuple[Piece, ...] | None:
        """The whole of it, if it is the same few pieces in every sequence: then no kernel needs a matrix."""
        return self.once("pieces", self._pieces)

    @property
    def matrix(self) -> Tensor:
        """Bool (1 or B, 1, Q, K), True where the query sees the key."""
        return self.once("matrix", self._matrix)

    def sees(self, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the query at one position sees the key at another; arguments as those of `Mask.allowed`."""
        seen = self.mask.allowed(sequence, query, key)
        if self.ends is not None:
            seen = seen & (key < self._end_of_each[sequence])
        return seen | (key == query)

    @property
    def _end_of_each(self) -> Tensor:
        return self.once("ends", lambda: torch.tensor(self.ends, device=self.device))

    def _pieces(self) -> tuple[Piece, ...] | None:
        if isinstance(self.queries, Tensor):
            return None
        return self.mask.pieces(self.queries, self.count, self.keys)

    def _matrix(self) -> Tensor:
        sequence = torch.arange(self.batch, device=self.device)[:, None, None]
        keys = _consecutive(0, self.keys, self.device)
        return self.sees(sequence, self.positions.unsqueeze(-1), keys.unsqueeze(-2)).unsqueeze(1)


def _consecutive(start: int, count: int, device: torch.device) -> Tensor:
    # Not arange(start, start + count), of which a compiler would believe that its length depends on two numbers.
    return (torch.arange(count, device=device) + start).unsqueeze(0)
