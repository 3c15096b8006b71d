"""What each step asks of the model: which windows, and which weights of the objective, as functions of the step."""

from __future__ import annotations

import torch
from torch import Tensor

from evo.core import ClockDensity, Exploration, Extremes, Objective
from evo.schedules import Path, early_stop, full, late_start
from evo.training.config import CurriculumConfig
from evo.training.seeds import Purpose, generator

PATHS: dict[str, Path] = {"early_stop": early_stop, "late_start": late_start, "full": full}


def objective(
    config: CurriculumConfig,
    step: int,
    steps: int,
    clock: ClockDensity | None = None,
    extremes: Extremes | None = None,
) -> Objective:
    """The objective of step `step` (from 0) of `steps`: auxiliary weight, exploration and level noise fall as the run goes on.

    `clock` and `extremes` are what a run has found so far, each used if `config` asks for it.
    """
    progress = step / max(1, steps - 1)
    fallen = min(1.0, progress / config.auxiliary_share) if config.auxiliary_share else 1.0
    return Objective(
        causal_weight=config.causal,
        flow_weight=config.flow,
        teaching=config.teaching,
        self_conditioning=config.self_conditioning,
        parallel=config.parallel,
        clock=clock if config.importance else None,
        extremes=extremes if config.compare_ends else None,
        aux_weight=_between(config.auxiliary, config.auxiliary_floor, fallen),
        entropy_weight=config.level_entropy,
        level_price=config.level_price,
        trials=config.trials,
        label_smoothing=config.label_smoothing,
        weight_cap=config.weight_cap,
        exploration=Exploration(
            share=1.0 if progress < config.explore_alone else _between(config.explore, config.explore_floor, progress),
            noise=_between(config.level_noise, config.level_noise_floor, progress),
            masked=config.masked,
        ),
    )


def windows(
    share: float, suffix_share: float, seed: int, step: int, count: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt lengths, ends and suffix lengths of `count` sequences of `length` tokens, each (count,) int64, a function of (seed, step).

    A `share` of them has a prompt of 1 … length − 1 tokens and a window that ends anywhere behind it, both uniform. A `suffix_share` has
    a prompt of 0 … length − 2 tokens, and a suffix up to the end of the sequence that begins anywhere behind the window's first token,
    both uniform. Of the others the window is the whole sequence: prompt 0, end `length`, suffix 0.
    """
    g = generator("cpu", seed, Purpose.WINDOWS, step)
    cut, prompt, end = torch.rand(3, count, generator=g, dtype=torch.float64)
    prompts = 1 + (prompt * (length - 1)).long()
    ends = prompts + 1 + (end * (length - prompts)).long()
    chosen, between = cut < share, (cut >= share) & (cut < share + suffix_share)
    before = (prompt * (length - 1)).long()
    behind = 1 + (end * (length - 1 - before)).long()
    return (
        torch.where(chosen, prompts, torch.where(between, before, 0)),
        torch.where(chosen, ends, length),
        torch.where(between, behind, 0),
    )


def _between(first: float, last: float, progress: float) -> float:
    return first + (last - first) * progress
