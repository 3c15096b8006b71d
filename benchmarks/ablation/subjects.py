"""What the options of a table ask for: rows, each with its data and, for text, with the model that reads its samples."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks._harness import describe_machine
from benchmarks.ablation.corpora import windows
from benchmarks.ablation.data import Data, puzzles
from benchmarks.ablation.files import Absent
from benchmarks.ablation.options import curriculum_of, places
from benchmarks.ablation.run import Places, Row, command, kept, run, trained_model
from benchmarks.ablation.tasks import TASKS
from evo import Evo
from evo.files import write_json

JUDGE_SEED = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A row, and everything it is made with.

    Args:
        row: its settings.
        data: of its task.
        judge: the row of the model that reads what is written; None for puzzles, which are judged by rule.
        device: of all of it.
        places: where it is kept.
        progress: whether bars are shown.
    """

    row: Row
    data: Data
    judge: Row | None
    device: torch.device
    places: Places
    progress: bool = True

    def result(self) -> dict[str, Any]:
        """Of the row: the one on disk, or a new one."""
        return run(self.row, self.data, self.device, judge=self.judge, places=self.places, progress=self.progress)

    def model(self) -> Evo:
        """Trained, in evaluation mode."""
        return trained_model(
            self.row, self.data, self.device, judge=self.judge, places=self.places, progress=self.progress
        )

    def reader(self) -> Evo | None:
        """The model that reads what is written, if it is text."""
        if self.judge is None:
            return None
        return trained_model(self.judge, self.data, self.device, places=self.places, progress=self.progress)

    def examined(
        self, table: str, settings: dict[str, Any], examine: Callable[[Subject], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `examine` finds of the trained row, kept as a row of another table: the one on disk if it has these settings.

        `settings` are those of the examination, as JSON values.
        """
        file = self.places.results / table / f"{self.row.name}.json"
        judge = None if self.judge is None else self.judge.settings()
        of = {"row": self.row.settings(), "judge": judge, "settings": settings}
        known = kept(file, of)
        if known is not None:
            return known
        found = {**of, "command": command(), "machine": describe_machine(self.device), **examine(self)}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
        return found


def subjects(given: argparse.Namespace) -> Iterator[Subject]:
    """Every row that the options ask for, seed by seed, so that a table cut off early has all variants.

    Texts that are not there are passed over, with a word why.
    """
    where = places(given)
    asked: Iterator[tuple[int, str, str]] = itertools.product(range(given.seeds), given.tasks, given.variants)
    for seed, task, variant in asked:
        shared: dict[str, Any] = {
            "task": task,
            "size": given.size,
            "seed": seed,
            "variant": variant,
            "budget": given.budget,
            "test_size": given.test_size,
            "curriculum": curriculum_of(given.curriculum),
            "label": given.label,
        }
        common: dict[str, Any] = {"device": given.device, "places": where, "progress": not given.quiet}
        if task in TASKS:
            for train_size in given.train_sizes:
                row = Row(table="planning", train_size=train_size, **shared)
                data = puzzles(TASKS[task], train_size, row.test_size, where.scratch / "examples")
                yield Subject(row=row, data=data, judge=None, **common)
            continue
        row = Row(table="text", length=given.length, samples=given.samples, **shared)
        try:
            data = windows(task, given.length, row.test_size, where.scratch / "corpora")
        except Absent as reason:
            print(f"{task} is passed over: {reason}")
            continue
        judge = Row(
            table="judge",
            task=task,
            size=given.judge_size,
            variant="t0",
            seed=JUDGE_SEED,
            budget=given.judge_budget or 2 * given.budget,
            length=given.length,
            test_size=row.test_size,
        )
        yield Subject(row=row, data=data, judge=judge, **common)
