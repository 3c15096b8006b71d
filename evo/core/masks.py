"""Who may look at whom: attention masks as small objects.

A mask is defined by `allowed`, a predicate on positions, and nothing else. Positions count from the beginning of each sequence (0 is
BOS, where there is one). What a mask tells beyond its definition, `pieces`, only makes it cheaper: where it consists of a few rectangles
and triangles, nobody needs a matrix.

B batch, N tokens, Q queries, K keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import NamedTuple

import torch
from torch import Tensor

# A kernel call for each block of fewer positions costs more than a matrix.
_SMALL = 64


class Piece(NamedTuple):
    """Consecutive queries, `start` to `stop` - 1 in the order given, that see the first `keys` keys.

    All of them do, or where `causal` is true the last query does, and each one before it sees one key fewer.
    """

    start: int
    stop: int
    keys: int
    causal: bool


class Mask(ABC):
    """Which keys each query may attend to."""

    @abstractmethod
    def allowed(self, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query sees a key.

        Args:
            sequence, query, key: index of the sequence in its batch, position of the query, position of the key: int64 tensors of
                shapes that broadcast to one, which may be (B, Q, K) or ().

        Returns:
            Bool, of a shape that broadcasts to that one.
        """

    def pieces(self, start: int, count: int, keys: int) -> tuple[Piece, ...] | None:
        """The mask of queries at start..start+count-1 over keys at 0..keys-1, in order, if that is a few pieces in every sequence."""
        return None

    def check(self, batch: int, keys: int) -> None:  # noqa: B027 (most masks serve any batch and any length)
        """Raise ValueError if the mask does not fit so many sequences or so many positions."""

    @property
    def per_sequence(self) -> bool:
        """Whether sequences of a batch may differ."""
        return True

    def __and__(self, other: Mask) -> AllOf:
        return AllOf(masks=(self, other))

    def __or__(self, other: Mask) -> AnyOf:
        return AnyOf(masks=(self, other))


@dataclass(frozen=True)
class Causal(Mask):
    """A position sees itself and everything before it."""

    def allowed(self, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def pieces(self, start: int, count: int, keys: int) -> tuple[Piece, ...] | None:
        return (_triangle(count, start + count),)

    @property
    def per_sequence(self) -> bool:
        return False


@dataclass(frozen=True)
class Leading(Mask):
    """Everybody sees the first `count` positions: what is `| Leading(1)` keeps BOS in sight."""

    count: int

    def allowed(self, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < self.count

    @property
    def per_sequence(self) -> bool:
        return False


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

    def allowed(self, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        prompt = _of(self.prompt, sequence)
        seen = (key <= query) | ((query >= prompt) & (key >= prompt))
        return seen if self.length is None else seen & (key < _of(self.length, sequence))

    def pieces(self, start: int, count: int, keys: int) -> tuple[Piece, ...] | None:
        if isinstance(self.prompt, Tensor) or isinstance(self.length, Tensor):
            return None
        if self.length is not None and self.length < keys:
            return None
        return _prompt_piece(self.prompt, start, count) + _window_piece(self.prompt, start, count, keys)

    def check(self, batch: int, keys: int) -> None:
        _check_per_sequence("Window", "prompt", self.prompt, batch)
        _check_per_sequence("Window", "length", self.length, batch)

    @property
    def per_sequence(self) -> bool:
        return isinstance(self.prompt, Tensor) or isinstance(self.length, Tensor)


@dataclass(frozen=True, eq=False)
class BlockCausal(Mask):
    """A causal prompt, followed by blocks: everybody in a block sees the prompt, all earlier blocks and the whole of its own.

    Args:
        size: positions in a block, at least 1; 1 is `Causal`.
        prompt: how many leading positions (BOS included) are prompt: int, or (B,) where sequences differ. The first block begins
            behind it.
    """

    size: int
    prompt: int | Tensor = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"BlockCausal(size={self.size}): a block needs at least 1 position")

    def allowed(self, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        prompt = _of(self.prompt, sequence)
        block = [(at - prompt).div(self.size, rounding_mode="floor") for at in (query, key)]
        return (key <= query) | ((query >= prompt) & (key >= prompt) & (block[1] <= block[0]))

    def pieces(self, start: int, count: int, keys: int) -> tuple[Piece, ...] | None:
        if isinstance(self.prompt, Tensor):
            return None
        if self.size < _SMALL and count > 2 * self.size:
            return None
        found, at, stop = _prompt_piece(self.prompt, start, count), max(start, self.prompt), start + count
        while at < stop:
            end = at + self.size - (at - self.prompt) % self.size
            found += (Piece(at - start, min(end, stop) - start, min(end, keys), False),)
            at = end
        return found

    def check(self, batch: int, keys: int) -> None:
        _check_per_sequence("BlockCausal", "prompt", self.prompt, batch)

    @property
    def per_sequence(self) -> bool:
        return isinstance(self.prompt, Tensor)


@dataclass(frozen=True, eq=False)
class Document(Mask):
    """Several documents in one sequence, each seeing only itself; usually `Document(ids) & Causal()`.

    Args:
        ids: int64 (B, N), or (1, N) where all sequences are alike: to which document each position belongs.
        lengths: the lengths of each sequence's documents, one behind another, where the host knows them; `from_lengths` makes both.
    """

    ids: Tensor
    lengths: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def from_lengths(cls, lengths: Sequence[Sequence[int]], device: torch.device | str | None = None) -> Document:
        """Documents of these lengths, one behind another, in each of B sequences. They fill each sequence: padding is a document too.

        Known on the host, they let the kernels for packed sequences be used without waiting for the device.

        Raises:
            ValueError: for a length below 1, or sequences of different total lengths.
        """
        known = tuple(tuple(each) for each in lengths)
        if not known or any(length < 1 for each in known for length in each) or len({sum(each) for each in known}) != 1:
            raise ValueError(
                f"documents of lengths {known} do not fill sequences of one length: give each sequence lengths of at least 1 "
                "with the same sum, padding being a document of its own"
            )
        ids = [torch.arange(len(each)).repeat_interleave(torch.tensor(each)) for each in known]
        return cls(torch.stack(ids).to(device), known)

    def allowed(self, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = sequence if len(self.ids) > 1 else torch.zeros_like(sequence)
        return self.ids[row, query] == self.ids[row, key]

    def check(self, batch: int, keys: int) -> None:
        if self.ids.dim() != 2 or self.ids.shape[0] not in (1, batch) or self.ids.shape[1] < keys:
            raise ValueError(
                f"Document ids have shape {tuple(self.ids.shape)}; {batch} sequences of {keys} positions need "
                f"({batch}, {keys}) or longer"
            )


@dataclass(frozen=True, eq=False)
class Rows(Mask):
    """What another mask says of the sequences of its batch from `start` on."""

    mask: Mask
    start: int

    def allowed(self, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.mask.allowed(sequence + self.start, query, key)

    def pieces(self, start: int, count: int, keys: int) -> tuple[Piece, ...] | None:
        return self.mask.pieces(start, count, keys)


@dataclass(frozen=True, eq=False)
class _Combined(Mask):
    """Several masks as one."""

    masks: tuple[Mask, ...]

    def check(self, batch: int, keys: int) -> None:
        for mask in self.masks:
            mask.check(batch, keys)

    @property
    def per_sequence(self) -> bool:
        return any(mask.per_sequence for mask in self.masks)


class AllOf(_Combined):
    """What every one of several masks allows: `first & second`."""

    def allowed(self, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return reduce(and_, (mask.allowed(sequence, query, key) for mask in self.masks))


class AnyOf(_Combined):
    """What at least one of several masks allows: `first | second`."""

    def allowed(self, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return reduce(or_, (mask.allowed(sequence, query, key) for mask in self.masks))


def _of(value: int | Tensor, sequence: Tensor) -> int | Tensor:
    return value[sequence] if isinstance(value, Tensor) else value


def _triangle(count: int, keys: int) -> Piece:
    # An `if` and no comparison as value: of a length that a compiler keeps symbolic that would not be a bool, as kernels want it.
    if count == 1:
        return Piece(0, 1, keys, False)
    return Piece(0, count, keys, True)


def _prompt_piece(prompt: int, start: int, count: int) -> tuple[Piece, ...]:
    stop = min(start + count, prompt)
    return (_triangle(stop - start, stop),) if start < stop else ()


def _window_piece(prompt: int, start: int, count: int, keys: int) -> tuple[Piece, ...]:
    first = max(start, prompt) - start
    return (Piece(first, count, keys, False),) if first < count else ()


def _check_per_sequence(owner: str, name: str, value: int | Tensor | None, batch: int) -> None:
    if isinstance(value, Tensor) and value.shape != (batch,):
        raise ValueError(
            f"{owner}({name}=...) has shape {tuple(value.shape)}; a batch of {batch} sequences needs ({batch},), or one int for all"
        )
