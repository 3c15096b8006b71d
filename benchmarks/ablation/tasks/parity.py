"""Running parities, written from the last to the first: a chain of which the answer shows the end before the beginning."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import xor

from benchmarks.ablation.tasks.base import Example, Task


@dataclass(frozen=True, kw_only=True)
class ReversedParities(Task):
    """Prompt: bits x_1 … x_n. Answer: the parities of x_1 … x_i for i = n, n − 1, …, 1.

    From left to right the first token is the parity of all bits; from right to left each token is one step from the one before.

    Args:
        bits: n.
        forward: write the parities from the first to the last instead, the control in which nothing is to be planned.
    """

    bits: int = 16
    forward: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        return ("0", "1")

    @property
    def prompt_length(self) -> int:
        return self.bits

    @property
    def answer_length(self) -> int:
        return self.bits

    def draw(self, rng: random.Random) -> Example:
        bits = f"{rng.getrandbits(self.bits):0{self.bits}b}"
        return Example(bits, self._parities(bits))

    def correct(self, prompt: Sequence[str], answer: Sequence[str]) -> bool:
        return "".join(answer) == self._parities(prompt)

    def classes(self) -> tuple[str, ...]:
        order = range(1, self.bits + 1) if self.forward else range(self.bits, 0, -1)
        return tuple(f"of {count} bits" for count in order)

    def _parities(self, bits: Sequence[str]) -> str:
        running = "".join(map(str, accumulate(map(int, bits), xor)))
        return running if self.forward else running[::-1]
