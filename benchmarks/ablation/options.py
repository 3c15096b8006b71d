"""Options that all tables share, and the rows that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch

from benchmarks.ablation.corpora import CORPORA
from benchmarks.ablation.run import Places
from benchmarks.ablation.sizes import SIZES
from benchmarks.ablation.tasks import TASKS
from benchmarks.ablation.variants import VARIANTS
from evo.training import CurriculumConfig


def parser(
    description: str, known_tasks: Mapping[str, object], tasks: tuple[str, ...], budget: int
) -> argparse.ArgumentParser:
    """A parser with the shared options, those of the kinds of task that are known to a table, and its own defaults."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, ...")
    options.add_argument("--tasks", nargs="+", choices=list(known_tasks), default=list(tasks), metavar="TASK")
    options.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    options.add_argument("--size", choices=list(SIZES), default="micro")
    options.add_argument("--budget", type=_count, default=budget, help="tokens to train on, e.g. 2M")
    options.add_argument("--seeds", type=int, default=3, help="rows of each kind, with seeds 0, 1, ...")
    options.add_argument("--test-size", type=_count, default=512, help="test sequences")
    options.add_argument(
        "--curriculum",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="entries of CurriculumConfig, e.g. level_price=0.1 importance=false",
    )
    options.add_argument("--label", default="", help="put behind the names of rows, to tell trials apart")
    options.add_argument("--results", type=Path, default=Places().results, help="folder of results")
    options.add_argument("--scratch", type=Path, default=Places().scratch, help="folder of weights and checkpoints")
    options.add_argument("--quiet", action="store_true", help="no progress bars")
    if TASKS.keys() & known_tasks:
        planning = options.add_argument_group("planning")
        planning.add_argument(
            "--train-sizes", type=_count, nargs="+", default=[20_000], help="different training examples"
        )
    if CORPORA.keys() & known_tasks:
        text = options.add_argument_group("text")
        text.add_argument("--length", type=int, default=128, help="tokens of a sequence")
        text.add_argument("--samples", type=int, default=64, help="sequences written by each model")
        text.add_argument(
            "--judge-size",
            choices=list(SIZES),
            default="mini",
            help="size of the autoregressive model that reads the samples",
        )
        text.add_argument("--judge-budget", type=_count, help="its tokens; by default twice the budget")
    return options


def places(given: argparse.Namespace) -> Places:
    """Where the options say that results and weights are kept."""
    return Places(results=given.results, scratch=given.scratch)


def curriculum_of(entries: list[str]) -> CurriculumConfig:
    """The default curriculum, whole windows alone, with entries such as level_price=0.1 changed.

    Raises:
        ValueError: for an entry that is not one, with those there are.
    """
    kinds = {entry.name: type(entry.default) for entry in fields(CurriculumConfig)}
    changes: dict[str, object] = {"window": 0.0}
    for entry in entries:
        name, _, value = entry.partition("=")
        if name not in kinds:
            raise ValueError(f"{name!r} is no entry of the curriculum; there are {', '.join(kinds)}")
        changes[name] = value == "true" if kinds[name] is bool else kinds[name](value)
    return CurriculumConfig(**changes)  # pyright: ignore[reportArgumentType]


def _count(text: str) -> int:
    """1500, 20k, 2M or 1.5G."""
    factor = {"k": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:], 1)
    return round(float(text.rstrip("kMG")) * factor)
