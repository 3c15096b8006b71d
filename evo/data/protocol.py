"""What a training run needs of its data, whoever makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from evo.data.packing import Packed


class Data(Protocol):
    """Rows to train on and rows held out; `Corpus` is one."""

    @property
    def fingerprint(self) -> str:
        """Tells data apart: a run goes on with no other."""
        ...

    @property
    def vocabulary(self) -> int:
        """V."""
        ...

    def batch(self, seed: int, step: int, rows: Sequence[int], total: int, length: int) -> Packed:
        """Some rows of the whole batch of a step, a pure function of its arguments."""
        ...

    def held_out_batch(self, count: int, length: int) -> Packed:
        """At most `count` rows to evaluate on, always the same ones."""
        ...

    def text_bytes(self, tokens: Tensor, *, held_out: bool = False) -> float:
        """Length in UTF-8 of what ids of any shape stand for."""
        ...

    def describe(self, seed: int, step: int, row: int, total: int, length: int) -> str:
        """Where a row of a step comes from, for people."""
        ...
