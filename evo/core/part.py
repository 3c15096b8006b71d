"""The part of a step's batch that one call of the model holds, and what a row's place in that batch decides.

A step of training may cut its batch among ranks and passes. What is decided here is a function of a row's index in the whole batch,
known on the host, so that a row fares alike in every cut.

B sequences of the part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Subset(NamedTuple):
    """Some sequences of a part.

    Attributes:
        places: of them in the part, ascending.
        whole: how many such there are in the whole batch.
    """

    places: list[int]
    whole: int

    def rows(self, device: torch.device) -> slice | Tensor:
        """What picks them out of (B, ...): a slice where they are evenly spaced, else their places (int64)."""
        return _pick(self.places, device)

    def visited(self, device: torch.device) -> slice | Tensor:
        """Rows for a pass over them: `rows`, or the first row of a part that has none, since its parameters may be sharded among ranks,
        of which all or none must make the pass.
        """
        return _pick(self.visited_places, device)

    @property
    def visited_places(self) -> list[int]:
        """The places of `visited`."""
        return self.places or [0]

    def within(self, other: Subset) -> Subset:
        """These, all of them among `other`, with their places in a pass over that."""
        index = {place: number for number, place in enumerate(other.places)}
        return Subset([index[place] for place in self.places], self.whole)


class Kinds(NamedTuple):
    """The sequences whose levels are random, and those that have the head's.

    Attributes:
        explorers, learners: these two.
        ranks: of each sequence of the part, how many of its own kind precede it in the whole batch.
    """

    explorers: Subset
    learners: Subset
    ranks: list[int]

    def some_learners(self, share: float) -> Subset:
        """A share of the learners, rounded down, evenly spread over them."""
        places = [place for place in self.learners.places if _chosen(self.ranks[place], share)]
        return Subset(places, _before(self.learners.whole, share))


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of a step's whole batch one call of the model holds; the losses of all parts add up to that of the whole.

    Args:
        rows: index of each of the B sequences in the whole batch.
        total: sequences of the whole batch.
        scored: tokens scored in the whole batch, a number or a 0-dim tensor on the model's device.
        common: draws what all sequences of a step share, on the model's device: for each call a fresh one, seeded alike in all
            parts. None takes the call's one generator, or torch's own.
    """

    rows: Sequence[int]
    total: int
    scored: int | Tensor
    common: torch.Generator | None = None

    @property
    def count(self) -> int | Tensor:
        """What sums over scored tokens are divided by: `scored`, at least 1."""
        return self.scored.clamp(min=1) if isinstance(self.scored, Tensor) else max(1, self.scored)

    def strata(self, like: Tensor) -> Tensor:
        """Points (B,) of [0, 1), evenly spread over the whole batch, in the dtype and on the device of `like`."""
        if isinstance(self.rows, range):
            rows = torch.arange(self.rows.start, self.rows.stop, self.rows.step, dtype=like.dtype, device=like.device)
        else:
            rows = to_device(torch.tensor(self.rows, dtype=like.dtype), like.device)
        return rows / self.total

    def kinds(self, share: float) -> Kinds:
        """The part divided into explorers, a share of the whole batch rounded down, and learners."""
        before = [_before(row, share) for row in self.rows]
        explores = [_chosen(row, share) for row in self.rows]
        explorers = _before(self.total, share)
        return Kinds(
            explorers=Subset([place for place, one in enumerate(explores) if one], explorers),
            learners=Subset([place for place, one in enumerate(explores) if not one], self.total - explorers),
            ranks=[
                number if one else row - number for row, number, one in zip(self.rows, before, explores, strict=True)
            ],
        )

    def some(self, share: float, kinds: Kinds | None = None) -> Subset:
        """A share of the sequences, evenly spread over the whole batch; or over each kind of them, if they are divided."""
        if kinds is None:
            return Subset(
                [place for place, row in enumerate(self.rows) if _chosen(row, share)], _before(self.total, share)
            )
        return Subset(
            [place for place, rank in enumerate(kinds.ranks) if _chosen(rank, share)],
            _before(kinds.explorers.whole, share) + _before(kinds.learners.whole, share),
        )


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """What the host knows, on the device; the host does not wait for what the device is doing."""
    return values.to(device, non_blocking=True)


def _before(row: int, share: float) -> int:
    """How many of the rows before this one belong to a share of all rows."""
    return math.floor(row * share)


def _chosen(row: int, share: float) -> bool:
    """Whether a row belongs to a share of all rows, evenly spread."""
    return _before(row + 1, share) > _before(row, share)


def _pick(places: list[int], device: torch.device) -> slice | Tensor:
    if not places:
        return slice(0, 0)
    step = places[1] - places[0] if len(places) > 1 else 1
    if places == list(range(places[0], places[-1] + 1, step)):
        return slice(places[0], places[-1] + 1, step)
    return to_device(torch.tensor(places), device)
