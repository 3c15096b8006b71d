"""Chains of arithmetic: word problems without the words, of as many steps as one likes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.ablation.tasks.base import Example, Task, numerals

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class ArithmeticChain(Task):
    """Prompt: statements "b = a + 3" in random order and the first value. Answer: the value after every step.

    A statement is four tokens, the new quantity, the one it is made of, operator and operand; all is modulo `modulus`.
    The first statement, "a = 3", is written "a a + 3" with a = 0 before it.

    Args:
        steps: how many values follow one from another.
        modulus: of the arithmetic, and so how many values there are.
        result_first: write the values from the last to the first, the result before the steps that lead to it.
    """

    steps: int = 5
    modulus: int = 7
    result_first: bool = False

    def __post_init__(self) -> None:
        if not (1 <= self.steps <= len(LETTERS) and 3 <= self.modulus <= 100):
            raise ValueError(
                f"steps {self.steps}, modulus {self.modulus}: needed 1 to {len(LETTERS)} steps and a modulus of 3 to 100"
            )

    @property
    def words(self) -> tuple[str, ...]:
        return (*numerals(self.modulus), "+", "-", "*", *LETTERS)

    @property
    def prompt_length(self) -> int:
        return 4 * self.steps

    @property
    def answer_length(self) -> int:
        return self.steps

    def draw(self, rng: random.Random) -> Example:
        names = rng.sample(LETTERS, self.steps)
        statements = [(names[0], names[0], "+", str(rng.randrange(self.modulus)))]
        for old, new in itertools.pairwise(names):
            operator = rng.choice("+-*")
            # A product with 0 would forget the chain, one with 1 would be no step.
            operand = rng.randrange(2, self.modulus) if operator == "*" else rng.randrange(1, self.modulus)
            statements.append((new, old, operator, str(operand)))
        rng.shuffle(statements)
        prompt = [word for statement in statements for word in statement]
        return Example(prompt, self._values(prompt))

    def correct(self, prompt: Sequence[str], answer: Sequence[str]) -> bool:
        return list(answer) == self._values(prompt)

    def identity(self, example: Example) -> str:
        """The operations in the order of the chain, whatever the quantities are called."""
        return " ".join(f"{operator}{operand}" for _, operator, operand in self._chain(example.prompt))

    def classes(self) -> tuple[str, ...]:
        order = range(self.steps, 0, -1) if self.result_first else range(1, self.steps + 1)
        return tuple(f"step {step}" for step in order)

    def _chain(self, prompt: Sequence[str]) -> list[tuple[str, str, str]]:
        statements = [prompt[k : k + 4] for k in range(0, len(prompt), 4)]
        follows = {old: (new, operator, operand) for new, old, operator, operand in statements if new != old}
        name = next(new for new, old, _, _ in statements if new == old)
        chain = [(name, "+", next(operand for new, old, _, operand in statements if new == old))]
        while name in follows:
            chain.append(follows[name])
            name = follows[name][0]
        return chain

    def _values(self, prompt: Sequence[str]) -> list[str]:
        value, values = 0, []
        for _, operator, operand in self._chain(prompt):
            number = int(operand)
            value = {"+": value + number, "-": value - number, "*": value * number}[operator] % self.modulus
            values.append(str(value))
        return values[::-1] if self.result_first else values
