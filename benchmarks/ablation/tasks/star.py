"""Star graphs: find the arm that leads to the goal (Bachmann & Nagarajan 2024).

Arms of equal length leave the start. The only choice is the first step, and nothing near the start tells which is right: the
arm has to be followed back from the goal. Learned left to right with the truth at hand, every later step is a look-up, which
hides the choice.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.ablation.tasks.base import Example, Task, numerals


@dataclass(frozen=True, kw_only=True)
class StarGraph(Task):
    """Prompt: the edges, shuffled, away from the start, then start and goal. Answer: the path, both ends included.

    Args:
        arms: paths that leave the start; a guess is right once in so many.
        path: nodes of an arm, start and end included.
        nodes: names that are drawn from.
    """

    arms: int = 2
    path: int = 5
    nodes: int = 20

    def __post_init__(self) -> None:
        used = 1 + self.arms * (self.path - 1)
        if self.arms < 1 or self.path < 2 or self.nodes < used:
            raise ValueError(
                f"arms {self.arms}, path {self.path}, nodes {self.nodes}: needed 1 arm of 2 nodes or more, and {used} names"
            )

    @property
    def words(self) -> tuple[str, ...]:
        return numerals(self.nodes)

    @property
    def prompt_length(self) -> int:
        return 2 * self.arms * (self.path - 1) + 2

    @property
    def answer_length(self) -> int:
        return self.path

    def draw(self, rng: random.Random) -> Example:
        names = rng.sample(self.words, 1 + self.arms * (self.path - 1))
        start, rest = names[0], names[1:]
        arms = [[start, *rest[k :: self.arms]] for k in range(self.arms)]
        edges = [edge for arm in arms for edge in itertools.pairwise(arm)]
        rng.shuffle(edges)
        return Example([node for edge in edges for node in edge] + [start, arms[0][-1]], arms[0])

    def correct(self, prompt: Sequence[str], answer: Sequence[str]) -> bool:
        edges = set(zip(prompt[:-2:2], prompt[1:-2:2], strict=True))
        steps = itertools.pairwise(answer)
        return answer[0] == prompt[-2] and answer[-1] == prompt[-1] and all(step in edges for step in steps)

    def identity(self, example: Example) -> str:
        prompt = example.prompt
        edges = sorted(zip(prompt[:-2:2], prompt[1:-2:2], strict=True))
        return " ".join([*(f"{a}>{b}" for a, b in edges), *prompt[-2:]])

    def classes(self) -> tuple[str, ...]:
        return ("start", "fork", *(f"step {k}" for k in range(2, self.path - 1)), "goal")[: self.path]
