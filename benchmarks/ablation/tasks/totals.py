"""Running sums with the total written first: an answer before the working that leads to it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from benchmarks.ablation.tasks.base import Example, Task, numerals


@dataclass(frozen=True, kw_only=True)
class TotalFirst(Task):
    """Prompt: numbers d_1 … d_n. Answer: the sum of all n, then those of the first 1, 2, …, n − 1, modulo `modulus`.

    Each running sum is one step from the one before it, and the total one step from the last of them. From left to right it has to be said
    before any of them.

    Args:
        terms: n.
        modulus: of the sums, and so how many numbers there are.
    """

    terms: int = 8
    modulus: int = 10

    def __post_init__(self) -> None:
        if self.terms < 2 or not 2 <= self.modulus <= 100:
            raise ValueError(
                f"terms {self.terms}, modulus {self.modulus}: needed at least 2 terms and a modulus of 2 to 100"
            )

    @property
    def words(self) -> tuple[str, ...]:
        return numerals(self.modulus)

    @property
    def prompt_length(self) -> int:
        return self.terms

    @property
    def answer_length(self) -> int:
        return self.terms

    def draw(self, rng: random.Random) -> Example:
        prompt = rng.choices(self.words, k=self.terms)
        return Example(prompt, self._sums(prompt))

    def correct(self, prompt: Sequence[str], answer: Sequence[str]) -> bool:
        return list(answer) == self._sums(prompt)

    def classes(self) -> tuple[str, ...]:
        return ("total", *(f"sum of {count}" for count in range(1, self.terms)))

    def _sums(self, prompt: Sequence[str]) -> list[str]:
        *running, total = (str(value % self.modulus) for value in accumulate(map(int, prompt)))
        return [total, *running]
