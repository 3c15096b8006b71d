"""The planning tasks by name."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.ablation.tasks.addition import Addition
from benchmarks.ablation.tasks.base import Task
from benchmarks.ablation.tasks.chain import ArithmeticChain
from benchmarks.ablation.tasks.countdown import Countdown
from benchmarks.ablation.tasks.parity import ReversedParities
from benchmarks.ablation.tasks.star import StarGraph
from benchmarks.ablation.tasks.store import examples
from benchmarks.ablation.tasks.sudoku import Sudoku4, Sudoku9
from benchmarks.ablation.tasks.totals import TotalFirst

TASKS: Mapping[str, Task] = {
    "star-2x3": StarGraph(arms=2, path=3, nodes=10),
    "star-2x5": StarGraph(arms=2, path=5, nodes=20),
    "star-3x4": StarGraph(arms=3, path=4, nodes=20),
    "star-5x5": StarGraph(arms=5, path=5, nodes=50),
    "sudoku-4": Sudoku4(clues=6),
    "sudoku-4-any": Sudoku4(clues=None),
    "sudoku-9": Sudoku9(),
    "countdown-3": Countdown(numbers=3),
    "countdown-4": Countdown(numbers=4),
    "addition-3": Addition(digits=3),
    "addition-6": Addition(digits=6),
    "parity-8": ReversedParities(bits=8),
    "parity-10": ReversedParities(bits=10),
    "parity-12": ReversedParities(bits=12),
    "parity-16": ReversedParities(bits=16),
    "parity-16-forward": ReversedParities(bits=16, forward=True),
    "chain-3": ArithmeticChain(steps=3),
    "chain-5": ArithmeticChain(steps=5),
    "chain-8": ArithmeticChain(steps=8),
    "total-first-6": TotalFirst(terms=6, modulus=5),
    "total-first-12": TotalFirst(terms=12, modulus=5),
    "chain-5-result-first": ArithmeticChain(steps=5, result_first=True),
}

__all__ = ["TASKS", "Task", "examples"]
