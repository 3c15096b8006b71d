"""What a training run needs of its data, whoever makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from evo.data.packing import Packed


class Data(Protocol):
    """Rows to train on and rows held out; `Corpus` is one.

    What a batch has to be is said by `Packed`, which also says which tokens are scored.
    """

    @property
    def fingerprint(self) -> str:
        """Tells data apart: a run goes on with no other."""
        ...

    @property
    def vocabulary(self) -> int:
        """V: ids lie in [0, V). A model may have more entries, and none fewer."""
        ...

    def batch(self, seed: int, step: int, rows: Sequence[int], total: int, length: int) -> Packed:
        """Some rows, indices in [0, total), of the whole batch of a step: (len(rows), length), a pure function of its arguments."""
        ...

    def held_out_batch(self, count: int, length: int) -> Packed:
        """At most `count` rows, and at least one, to evaluate on: (S, length), always the same ones."""
        ...

    def text_bytes(self, tokens: Tensor, *, held_out: bool = False) -> float:
        """Length in UTF-8 of what ids of any shape stand for."""
        ...

    def describe(self, seed: int, step: int, row: int, total: int, length: int) -> str:
        """Where a row of a step comes from, for people."""
        ...
