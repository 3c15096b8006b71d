"""Whole sets of options, by name; every one of them can still be changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from evo.training.config import CurriculumConfig, OptimizerConfig, TrainConfig

_LARGE = ("L", "XL", "H")
_TOKENS = 3.4e12


def laptop(data: Path, preset: str = "tiny") -> TrainConfig:
    """The defaults: a small model on one machine."""
    return TrainConfig(data=data, preset=preset)


def paper(data: Path, preset: str = "S") -> TrainConfig:
    """Pretraining as the paper has it (Wu et al., appendix): 4 096 tokens a sequence, 2 M tokens a step for the smaller sizes and 4 M for
    L, XL and H, for 3.4 T tokens; AdamW at .9, .95, 1e-8 and .1, 3 000 steps of warm-up, cosine, a peak of 2e-4 or 1.5e-4; dropout .1,
    label smoothing .1, clipping at 1, averaged weights at .9999, bfloat16.

    What the paper leaves open (the floor of the rate, the curriculum) is as by default. How the sequences of a step are cut into passes
    (`micro_batch`) and spread over ranks (`parallel`) is for whoever knows the machines.
    """
    length, large = 4096, preset in _LARGE
    sequences = 1024 if large else 512
    return TrainConfig(
        data=data,
        preset=preset,
        overrides={"dropout": 0.1},
        steps=round(_TOKENS / (sequences * length)),
        batch_size=sequences,
        length=length,
        precision="bf16",
        save_every=1000,
        optimizer=OptimizerConfig(learning_rate=1.5e-4 if large else 2e-4, warmup=3000),
        curriculum=CurriculumConfig(label_smoothing=0.1),
    )


RECIPES: Mapping[str, Callable[..., TrainConfig]] = {"laptop": laptop, "paper": paper}
"""By the names they have in options."""
