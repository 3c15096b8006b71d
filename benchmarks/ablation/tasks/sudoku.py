"""Sudoku: fill a grid so that every row, column and box has every symbol once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from benchmarks.ablation.files import read_text
from benchmarks.ablation.tasks.base import Example, Task

BLANK = "0"


@lru_cache(maxsize=4)
def units(edge: int) -> tuple[tuple[int, ...], ...]:
    """The cells, row by row from 0, of every row, column and box of an `edge` × `edge` grid."""
    box = round(edge**0.5)
    rows = [tuple(edge * r + c for c in range(edge)) for r in range(edge)]
    columns = [tuple(edge * r + c for r in range(edge)) for c in range(edge)]
    corners = [edge * r + c for r in range(0, edge, box) for c in range(0, edge, box)]
    boxes = [tuple(corner + edge * r + c for r in range(box) for c in range(box)) for corner in corners]
    return (*rows, *columns, *boxes)


def solves(clues: Sequence[str], grid: Sequence[str], edge: int) -> bool:
    """Whether `grid` keeps the clues and has every symbol once in every unit."""
    kept = all(clue in (BLANK, cell) for clue, cell in zip(clues, grid, strict=True))
    return kept and all(len({grid[k] for k in unit} - {BLANK}) == edge for unit in units(edge))


@lru_cache(maxsize=1)
def grids() -> tuple[str, ...]:
    """All 288 solved 4 × 4 grids, as 16 digits row by row."""
    peers = [sorted({k for unit in units(4) if cell in unit for k in unit if k < cell}) for cell in range(16)]
    found = [""]
    for cell in range(16):
        found = [grid + digit for grid in found for digit in "1234" if all(grid[k] != digit for k in peers[cell])]
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Sudoku4(Task):
    """4 × 4. Prompt: 16 cells, 0 where blank. Answer: 16 cells. The solution decides the side: no grid is on both.

    With few clues a puzzle may have several solutions, of which any counts.

    Args:
        clues: cells given; None draws 4 to 10 for each puzzle.
    """

    clues: int | None = 6

    @property
    def words(self) -> tuple[str, ...]:
        return (BLANK, *"1234")

    @property
    def prompt_length(self) -> int:
        return 16

    @property
    def answer_length(self) -> int:
        return 16

    def draw(self, rng: random.Random) -> Example:
        grid = rng.choice(grids())
        given = set(rng.sample(range(16), rng.randint(4, 10) if self.clues is None else self.clues))
        return Example([cell if k in given else BLANK for k, cell in enumerate(grid)], grid)

    def correct(self, prompt: Sequence[str], answer: Sequence[str]) -> bool:
        return solves(prompt, answer, 4)

    def identity(self, example: Example) -> str:
        return "".join(example.answer)

    def classes(self) -> tuple[str, ...]:
        return tuple(f"row {k // 4}" for k in range(16))


@lru_cache(maxsize=1)
def published() -> list[tuple[str, str]]:
    """Puzzles and solutions, 81 digits each. Raises `Absent` where the data set is not there."""
    lines = read_text("sudoku/gen_train.csv.xz").splitlines()[1:]
    return [(line[:81], line[82:]) for line in lines]


@dataclass(frozen=True, kw_only=True)
class Sudoku9(Task):
    """9 × 9, from 100 000 puzzles of 31 to 36 clues and one solution each. Prompt and answer: 81 cells, 0 where blank."""

    @property
    def words(self) -> tuple[str, ...]:
        return (BLANK, *"123456789")

    @property
    def prompt_length(self) -> int:
        return 81

    @property
    def answer_length(self) -> int:
        return 81

    def draw(self, rng: random.Random) -> Example:
        return Example(*rng.choice(published()))

    def correct(self, prompt: Sequence[str], answer: Sequence[str]) -> bool:
        return solves(prompt, answer, 9)

    def identity(self, example: Example) -> str:
        return "".join(example.answer)

    def classes(self) -> tuple[str, ...]:
        return tuple(f"row {k // 9}" for k in range(81))
