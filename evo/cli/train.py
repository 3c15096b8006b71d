"""`evo train`: the options are those of `TrainConfig`, and a recipe that sets their defaults."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from evo.training import RECIPES, TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class Options(TrainConfig):
    __doc__ = TrainConfig.__doc__

    data: Path = Path()
    """File or folder of text, or a folder made by `evo prepare`."""
    recipe: Literal["laptop", "paper"] = "laptop"
    """What options are that are not given: those of a small model on one machine, or those of the paper for the preset."""


def defaults(arguments: Sequence[str]) -> Options:
    """The options of the recipe, and of the preset, that `arguments` name; `data` is still to be given."""
    from tyro import MISSING

    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    look.add_argument("--recipe", choices=RECIPES, default="laptop")
    look.add_argument("--preset")
    known, _ = look.parse_known_args(arguments)
    recipe = RECIPES[known.recipe]
    config = recipe(Path(), known.preset) if known.preset else recipe(Path())
    return replace(Options(**_values(config), recipe=known.recipe), data=MISSING)


def run(options: Options) -> None:
    """Train, and on the first rank say where the model is and how well it codes held-out text."""
    result = train(TrainConfig(**_values(options)))
    if int(os.environ.get("RANK", 0)) > 0:
        return
    # A figure that is not finite is null, as the error of a single sequence.
    for level, figure in result.evaluation["levels"].items():
        bits, error = (math.nan if (value := figure[name]) is None else value for name in ("bits", "standard_error"))
        print(f"held-out bits per byte, level {level:<8}{bits:.4f} ± {error:.4f}")
    skipped = f", {result.skipped} left out" if result.skipped else ""
    print(f"{result.steps} steps{skipped}; the model is in {options.out / 'model'}", file=sys.stderr)


def _values(config: TrainConfig) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in fields(TrainConfig)}
