"""What a planning task is: prompts and answers of fixed length over a small vocabulary, and a rule that judges answers.

S examples, P prompt tokens, A answer tokens.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Split = Literal["train", "test"]

# So many draws in a row that bring nothing new, and a small task counts as exhausted.
PATIENCE = 2000


class Example(NamedTuple):
    """A prompt and an answer to it, as words of the task's vocabulary."""

    prompt: Sequence[str]
    answer: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A family of puzzles; the fields of a subclass are its knobs.

    Every token of the answer is scored. An answer that may be shorter is filled up with a word of its own: a window that
    knew its length from the outset would have been told part of the answer.
    """

    @property
    @abstractmethod
    def words(self) -> tuple[str, ...]:
        """The vocabulary; a token is the index of its word."""

    @property
    @abstractmethod
    def prompt_length(self) -> int:
        """P."""

    @property
    @abstractmethod
    def answer_length(self) -> int:
        """A."""

    @abstractmethod
    def draw(self, rng: random.Random) -> Example:
        """An example, a function of the state of `rng` alone."""

    @abstractmethod
    def correct(self, prompt: Sequence[str], answer: Sequence[str]) -> bool:
        """Whether the answer solves the prompt, by the rules: any solution counts."""

    def identity(self, example: Example) -> str:
        """What makes two examples the same puzzle, however it is written; its hash decides between training and test."""
        return " ".join(example.prompt)

    def classes(self) -> tuple[str, ...]:
        """What each of the A answer positions is, for figures by class."""
        return tuple(f"token {index}" for index in range(self.answer_length))

    def split_of(self, example: Example) -> Split:
        """The side of an example: one puzzle in five is for testing, whatever the seed and the sizes."""
        digest = hashlib.sha256(self.identity(example).encode()).digest()
        return "test" if digest[0] < 256 / 5 else "train"

    def encode(self, example: Example) -> list[int]:
        """Tokens of prompt and answer, P + A."""
        index = _indices(self.words)
        return [index[word] for word in (*example.prompt, *example.answer)]

    def decode(self, tokens: Tensor) -> list[Example]:
        """Tokens (S, P + A) as words again."""
        words, cut = self.words, self.prompt_length
        rows = [[words[token] for token in row] for row in tokens.tolist()]
        return [Example(row[:cut], row[cut:]) for row in rows]

    def grade(self, tokens: Tensor) -> Tensor:
        """Tokens (S, P + A) -> bool (S,): whether each answer solves its prompt."""
        return torch.tensor([self.correct(*example) for example in self.decode(tokens)], dtype=torch.bool)


def draw_examples(task: Task, split: Split, count: int) -> Tensor:
    """The first `count` different examples of one side, (S, P + A) int64; fewer where the task has no more.

    Always the same ones, and each smaller training set is the beginning of a larger one. No puzzle is on both sides.
    """
    # Seeding by text is the same in every version of Python.
    rng = random.Random(f"{task!r} {split}")
    rows: dict[tuple[str, ...], list[int]] = {}
    missed = 0
    while len(rows) < count and missed < PATIENCE:
        example = task.draw(rng)
        prompt = tuple(example.prompt)
        if prompt in rows or task.split_of(example) != split:
            missed += 1
            continue
        missed = 0
        rows[prompt] = task.encode(example)
    if not rows:
        raise ValueError(f"{task} has no examples for {split}: give it a larger range")
    return torch.tensor(list(rows.values()), dtype=torch.int64)


@lru_cache(maxsize=64)
def numerals(count: int) -> tuple[str, ...]:
    """0, 1, … as words."""
    return tuple(map(str, range(count)))


@lru_cache(maxsize=64)
def _indices(words: tuple[str, ...]) -> dict[str, int]:
    return {word: index for index, word in enumerate(words)}
