"""Addition written from the high digit: the first digit depends on every carry below it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.ablation.tasks.base import Example, Task


@dataclass(frozen=True, kw_only=True)
class Addition(Task):
    """Prompt: two numbers of n digits, each from the high digit. Answer: n + 1 digits of the sum, from the high digit.

    Args:
        digits: n.
    """

    digits: int = 6

    @property
    def words(self) -> tuple[str, ...]:
        return (*"0123456789", "+", "=")

    @property
    def prompt_length(self) -> int:
        return 2 * self.digits + 2

    @property
    def answer_length(self) -> int:
        return self.digits + 1

    def draw(self, rng: random.Random) -> Example:
        a, b = rng.randrange(10**self.digits), rng.randrange(10**self.digits)
        return Example(f"{a:0{self.digits}}+{b:0{self.digits}}=", f"{a + b:0{self.digits + 1}}")

    def correct(self, prompt: Sequence[str], answer: Sequence[str]) -> bool:
        a, b = "".join(prompt).rstrip("=").split("+")
        return "".join(answer) == f"{int(a) + int(b):0{self.digits + 1}}"

    def identity(self, example: Example) -> str:
        return "+".join(sorted("".join(example.prompt).rstrip("=").split("+")))

    def classes(self) -> tuple[str, ...]:
        return tuple(f"10^{power}" for power in range(self.digits, -1, -1))
