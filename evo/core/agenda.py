"""Which tokens of a window each row of its plan has to compute, to read and to commit.

The host keeps this account, because it must know sizes before it can ask for kernels: a plan crosses over once a window, and after that
nobody waits for the device. On a device of its own, indices follow the work they belong to.

B batch, N tokens of the window, K refinement steps, T tokens computed in a row, R of them read, C of these committed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from evo.core.packing import Packing


@dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """What one row of a plan does. A place is an index into the window laid flat, (B·N,).

    Attributes:
        packing: whose the computed tokens are.
        computed: (T,) their places.
        picked: (R,) which of them are read, as indices into (T,); None is all of them.
        read: (R,) the places of these.
        moving: whether any token takes a step that is not its last.
    """

    packing: Packing
    computed: Tensor
    picked: Tensor | None
    read: Tensor
    moving: bool


class Agenda:
    """The account of one window.

    A sequence in which nothing moves costs nothing. Of the others the rows that refresh compute every token present, since keys and
    values of frozen tokens depend on those that move; the rows between compute the tokens that move, and once more each that has been
    committed since, whose keys and values still speak of its noise.

    Args:
        plan: levels (B, K+1, N), on any device.
        starts: the position of the first token in each of B sequences.
        lengths: tokens present in each of B windows, the first ones.
        refresh: every how many of a sequence's own rows all of it is computed.
        waiting: whether tokens that have a level but do not move yet are read too.
    """

    def __init__(self, plan: Tensor, starts: list[int], lengths: list[int], *, refresh: int, waiting: bool) -> None:
        self._plan, self._device = plan.to("cpu", copy=True), plan.device
        self._starts, self._ends = torch.tensor(starts), [a + b for a, b in zip(starts, lengths, strict=True)]
        self._present = torch.arange(plan.shape[2]) < torch.tensor(lengths)[:, None]
        self._refresh, self._waiting = refresh, waiting
        self._rows_done = torch.zeros(len(starts), dtype=torch.int64)
        self._stale = torch.zeros_like(self._present)
        self._moves = self._plan[:, 1:] != self._plan[:, :-1]
        self._busy = self._moves.any(2).any(0).tolist()
        self._last: tuple[Tensor, Tensor, Work] | None = None
        self._row = 0
        self._read = torch.zeros(0, dtype=torch.int64)

    def begin(self, row: int) -> Work | None:
        """The work of a row; None if nothing moves in it."""
        if not self._busy[row]:
            return None
        self._row, moves = row, self._moves[:, row]
        live = moves.any(1)
        read = moves | ((self._plan[:, row] > 0) & live[:, None]) if self._waiting else moves
        if self._refresh == 1:
            computed = self._present & live[:, None]
        else:
            fresh = live & (self._rows_done % self._refresh == 0)
            computed = torch.where(fresh[:, None], self._present, read | self._stale) & live[:, None]
            self._rows_done += live
            self._stale &= ~live[:, None]
        moving = bool((moves & (self._plan[:, row + 1] > 0)).any())
        if self._last is None or not (torch.equal(computed, self._last[0]) and torch.equal(read, self._last[1])):
            self._last = computed, read, self._work(computed, read, moving)
        work = self._last[2]
        return work if work.moving == moving else replace(work, moving=moving)

    def settle(self, settled: Tensor) -> bool:
        """Have some of the tokens (R,) bool that this row reads take their last step now, if they move; whether others move on."""
        early = torch.zeros_like(self._present).flatten()
        early[self._read[settled]] = True
        early = early.view_as(self._present) & self._moves[:, self._row]
        self._plan[:, self._row + 1 :].masked_fill_(early.unsqueeze(1), 0.0)
        self._moves[:, self._row + 1 :] &= ~early.unsqueeze(1)
        self._busy[self._row + 1 :] = self._moves[:, self._row + 1 :].any(2).any(0).tolist()
        return bool((self._moves[:, self._row] & (self._plan[:, self._row + 1] > 0)).any())

    def commit(self) -> tuple[Tensor, Tensor] | None:
        """Tokens whose last step is in this row: indices into those read, (C,), and places, (C,); None if there are none."""
        commits = self._moves[:, self._row] & (self._plan[:, self._row + 1] == 0)
        self._stale |= commits
        chosen = commits.flatten()[self._read].nonzero().squeeze(1)
        if not len(chosen):
            return None
        both = torch.stack([chosen, self._read[chosen]]).to(self._device, non_blocking=True)
        return both[0], both[1]

    def _work(self, computed: Tensor, read: Tensor, moving: bool) -> Work:
        size = computed.shape[1]
        place = computed.flatten().nonzero().squeeze(1)
        sequence = place // size
        counts = computed.sum(1)
        rows = counts.nonzero().squeeze(1)
        counts = counts[rows]
        widest = int(counts.max())
        # A token's rank among those of its sequence, behind all the room of the sequences before.
        behind = torch.arange(len(rows)) * widest - (counts.cumsum(0) - counts)
        queries = torch.arange(len(place)) + behind.repeat_interleave(counts)
        self._read = read.flatten().nonzero().squeeze(1)
        picked = computed.flatten().cumsum(0)[self._read] - 1
        starts = self._starts.tolist()
        block = starts[0] if len(place) == computed.numel() and len(set(starts)) == 1 else None
        even, whole, all_read = len(place) == len(rows) * widest, len(rows) == len(computed), len(picked) == len(place)
        parts = [place, sequence, self._starts[sequence] + place % size, queries, self._read, picked, rows]
        ends = list(accumulate(map(len, parts)))
        found = torch.cat(parts).to(self._device, non_blocking=True).tensor_split(ends[:-1])
        return Work(
            packing=Packing(
                batch=len(computed),
                rows=None if whole else found[6],
                sequence=found[1],
                slots=found[2],
                queries=None if even else found[3],
                count=widest,
                ends=tuple(self._ends[row] for row in rows.tolist()),
                block=block,
            ),
            computed=found[0],
            picked=None if all_read else found[5],
            read=found[4],
            moving=moving,
        )
