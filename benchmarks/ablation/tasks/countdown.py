"""Countdown: combine the numbers by arithmetic to reach the target (Gandhi et al. 2024; Ye et al. 2024).

The solution to learn is the first that a depth-first search finds, in the order that also made the published tests.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from benchmarks.ablation.tasks.base import Example, Task

END = "."
_STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


@dataclass(frozen=True, kw_only=True)
class Countdown(Task):
    """Prompt: `numbers` numbers of 1 to 99 and a target of 10 to 100, in digits. Answer: steps "a-b=c", each number used once.

    Args:
        numbers: how many, 2 to 5.
    """

    numbers: int = 3

    @property
    def words(self) -> tuple[str, ...]:
        return (*"0123456789", "+", "-", "*", "/", "=", ",", END)

    @property
    def prompt_length(self) -> int:
        return 2 * self.numbers + 3

    @property
    def answer_length(self) -> int:
        """Room for the longest answers but a few in a thousand, whose problems are not drawn."""
        return 11 * (self.numbers - 1)

    def draw(self, rng: random.Random) -> Example:
        while True:
            numbers = [rng.randint(1, 99) for _ in range(self.numbers)]
            target = rng.randint(10, 100)
            steps = solve(numbers, target)
            answer = ",".join(steps or ())
            if steps is not None and len(answer) < self.answer_length:
                prompt = "".join(f"{number:02}" for number in numbers) + f"{target:03}"
                return Example(prompt, answer.ljust(self.answer_length, END))

    def correct(self, prompt: Sequence[str], answer: Sequence[str]) -> bool:
        numbers, target = self._read(prompt)
        text, _, rest = "".join(answer).partition(END)
        steps = text.split(",")
        if rest.strip(END) or len(steps) != self.numbers - 1:
            return False
        for step in steps:
            found = _STEP.fullmatch(step)
            if found is None:
                return False
            a, b, result = int(found[1]), int(found[3]), int(found[4])
            for used in (a, b):
                if used not in numbers:
                    return False
                numbers.remove(used)
            if (result, found[2]) not in {(value, operator) for operator, _, _, value in operations(a, b)}:
                return False
            numbers.append(result)
        return numbers == [target]

    def identity(self, example: Example) -> str:
        numbers, target = self._read(example.prompt)
        return f"{sorted(numbers)} {target}"

    def classes(self) -> tuple[str, ...]:
        return tuple(f"character {index}" for index in range(self.answer_length))

    def _read(self, prompt: Sequence[str]) -> tuple[list[int], int]:
        text = "".join(prompt)
        return [int(text[2 * k : 2 * k + 2]) for k in range(self.numbers)], int(text[-3:])


def operations(a: int, b: int) -> list[tuple[str, int, int, int]]:
    """What two numbers make: operator, left, right, result; in the order of the search. Differences are never negative."""
    high, low = (a, b) if a >= b else (b, a)
    made = [("+", a, b, a + b), ("*", a, b, a * b), ("-", high, low, high - low)]
    return [*made, ("/", high, low, high // low)] if low and high % low == 0 else made


def solve(numbers: list[int], target: int) -> tuple[str, ...] | None:
    """The steps of the first way to the target, depth first: pairs by index, what they make put behind the numbers left."""
    for i, j in combinations(range(len(numbers)), 2):
        left = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        for operator, a, b, result in operations(numbers[i], numbers[j]):
            rest = () if result == target and not left else solve([*left, result], target) if left else None
            if rest is not None:
                return f"{a}{operator}{b}={result}", *rest
    return None
