"""Documents laid into rows of one length: where the cuts fall.

    Contiguous   the stream of documents, cut every `length` tokens: no padding, nothing to prepare, any size of corpus
    BestFit      a document is cut only where it is longer than a row, and pieces are put together so that they fill rows

R rows of a batch, N tokens of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from evo.data.shards import TokenShards


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Rows of a batch.

    Attributes:
        tokens: ids, (R, N) int64; behind the last document of a row, its bos.
        documents: to which document of its row each token belongs, (R, N) int64: 0, 1, …; the padding behind them is one more.
        loss_mask: bool (R, N), what is scored. A token that is not scored and stands before one that is, as a question before its
            answer, is text that the model reads; what stands behind the last one is padding, which nobody sees.

    Raises:
        TypeError, ValueError: for anything but three tensors of these dtypes and of one shape, with at least one row and one token.
    """

    tokens: Tensor
    documents: Tensor
    loss_mask: Tensor

    def __post_init__(self) -> None:
        for name, dtype in (("tokens", torch.int64), ("documents", torch.int64), ("loss_mask", torch.bool)):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != dtype:
                given = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} of a batch is {given}; a tensor (rows, length) of {dtype} is needed")
            if value.dim() != 2 or not value.numel() or value.shape != self.tokens.shape:
                raise ValueError(
                    f"{name} of a batch has shape {tuple(value.shape)} beside tokens {tuple(self.tokens.shape)}; "
                    "needed: (rows, length) for all, with at least one row and one token"
                )

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row up to the last one that is scored, (R,) int64, at least 1."""
        places = torch.arange(1, self.loss_mask.shape[1] + 1, device=self.loss_mask.device)
        return (places * self.loss_mask).amax(1).clamp(min=1)

    def rows(self, chosen: Tensor | slice) -> Packed:
        """Some of the rows."""
        return Packed(tokens=self.tokens[chosen], documents=self.documents[chosen], loss_mask=self.loss_mask[chosen])

    def pin_memory(self) -> Packed:
        """The same in memory from which a GPU copies while the host goes on."""
        return Packed(
            tokens=self.tokens.pin_memory(),
            documents=self.documents.pin_memory(),
            loss_mask=self.loss_mask.pin_memory(),
        )

    def to(self, device: torch.device | str) -> Packed:
        """The same on a device; from pinned memory the host does not wait for it."""
        return Packed(
            tokens=self.tokens.to(device, non_blocking=True),
            documents=self.documents.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
        )


class Rows(ABC):
    """A corpus as rows of one length."""

    count: int
    """How many there are."""

    @abstractmethod
    def segments(self, row: int, key: int) -> list[tuple[int, int]]:
        """The stretches (start, stop) of the stream that a row is made of, one a document.

        `key`, 64 random bits, is another one each epoch: rows may differ from epoch to epoch, as long as those of one do not overlap.
        """


class Packing(ABC):
    """A way to lay documents into rows."""

    @abstractmethod
    def rows(self, shards: TokenShards, length: int) -> Rows:
        """The rows of a corpus, of `length` tokens each.

        Raises:
            ValueError: where there are not tokens enough for one row.
        """


@dataclass(frozen=True)
class Contiguous(Packing):
    """The stream cut every `length` tokens, from another place each epoch, its end joined to its beginning.

    Each epoch sees every token once, but for fewer than `length` that are left over. A document that is cut goes on in another row, as a
    document of its own.
    """

    def rows(self, shards: TokenShards, length: int) -> Rows:
        check_enough(shards, length)
        return _Cuts(shards, length)


class _Cuts(Rows):
    def __init__(self, shards: TokenShards, length: int) -> None:
        self._shards, self._length, self._tokens = shards, length, shards.tokens
        self.count = self._tokens // length

    def segments(self, row: int, key: int) -> list[tuple[int, int]]:
        start = (row * self._length + key % self._tokens) % self._tokens
        stop = start + self._length
        found = self._between(start, min(stop, self._tokens))
        return found if stop <= self._tokens else found + self._between(0, stop - self._tokens)

    def _between(self, start: int, stop: int) -> list[tuple[int, int]]:
        return list(pairwise([start, *self._shards.ends(start, stop).tolist(), stop]))


@dataclass(frozen=True)
class BestFit(Packing):
    """Pieces of documents put into rows, longest first, each into the row that it fills best (Ding et al. 2024, "Fewer Truncations Improve
    Language Modeling").

    A document longer than a row is cut into full rows and a rest; all others stay whole. What is left of a row is padding. The index that
    says what lies where is made at first use, about a second for a million documents, and takes 16 bytes a piece and 8 a row.

    Args:
        buffer: documents that are packed together; more leave less padding, and bring documents further apart into one row.
    """

    buffer: int = 1 << 16

    def __post_init__(self) -> None:
        if self.buffer < 1:
            raise ValueError(f"BestFit(buffer={self.buffer}): at least 1 document must be packed at a time")

    def rows(self, shards: TokenShards, length: int) -> Rows:
        check_enough(shards, length)
        starts, stops, counts = [], [], []
        begin = 0
        for ends in shards.all_ends():
            for at in range(0, len(ends), self.buffer):
                group = np.concatenate([[begin], ends[at : at + self.buffer]])
                begin = int(group[-1])
                some_starts, some_stops, some_counts = _packed(group, length)
                starts.append(some_starts)
                stops.append(some_stops)
                counts.append(some_counts)
        places = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        return _Index(np.concatenate(starts), np.concatenate(stops), places)


class _Index(Rows):
    def __init__(self, starts: np.ndarray, stops: np.ndarray, places: np.ndarray) -> None:
        self._starts, self._stops, self._places = starts, stops, places
        self.count = len(places) - 1

    def segments(self, row: int, key: int) -> list[tuple[int, int]]:
        here = slice(*self._places[row : row + 2])
        return list(zip(self._starts[here].tolist(), self._stops[here].tolist(), strict=True))


def _packed(edges: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts and stops of the pieces of documents between these edges, row by row, and how many pieces each row has."""
    whole = np.diff(edges) // length
    firsts = np.repeat(edges[:-1], whole)
    within = np.arange(len(firsts)) - np.repeat(np.cumsum(whole) - whole, whole)
    full = firsts + within * length
    rests = edges[:-1] + whole * length
    sizes = edges[1:] - rests
    left = np.flatnonzero(sizes)
    left = left[np.argsort(-sizes[left], kind="stable")]
    bins = _best_fit(sizes[left].tolist(), length)
    order = np.argsort(bins, kind="stable")
    chosen = left[order]
    return (
        np.concatenate([full, rests[chosen]]),
        np.concatenate([full + length, edges[1:][chosen]]),
        np.concatenate([np.ones(len(full), np.int64), np.bincount(bins)]),
    )


def _best_fit(sizes: list[int], length: int) -> np.ndarray:
    """The row of each piece, from sizes that fall: of the rows with room for it, one with the least."""
    # Bit c of `rooms` says that `open_rows[c]`, rows with room for exactly c more, is not empty.
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]
    rooms, rows, found = 0, 0, np.empty(len(sizes), np.int64)
    for index, size in enumerate(sizes):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = length, rows
            rows += 1
        found[index] = row
        left = room - size
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    return found


def check_enough(shards: TokenShards, length: int) -> None:
    """Raise ValueError where a corpus has fewer tokens than a row."""
    if shards.tokens < length:
        raise ValueError(
            f"the text in {shards.folder} has {shards.tokens} tokens, a sequence needs {length}: "
            "give more text or a shorter length, or hold out another share of it (corpus.held_out)"
        )


def fill(shards: TokenShards, rows: list[list[tuple[int, int]]], length: int) -> Packed:
    """Rows of `length` tokens from the stretches of the stream that each is made of."""
    tokens = np.full((len(rows), length), shards.bos, np.int64)
    documents, present = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), bool)
    for index, segments in enumerate(rows):
        at = 0
        for number, (start, stop) in enumerate(segments):
            end = at + stop - start
            tokens[index, at:end] = shards.read(start, stop)
            documents[index, at:end] = number
            at = end
        documents[index, at:] = len(segments)
        present[index, :at] = True
    return Packed(
        tokens=torch.from_numpy(tokens), documents=torch.from_numpy(documents), loss_mask=torch.from_numpy(present)
    )


CONTIGUOUS = Contiguous()

PACKINGS: Mapping[str, Packing] = {"contiguous": CONTIGUOUS, "best_fit": BestFit()}
"""By the names they have in options."""
