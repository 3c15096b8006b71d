"""`evo train`: the options are those of `TrainConfig`."""

from __future__ import annotations

import sys

from evo.training import TrainConfig, train

Options = TrainConfig


def run(options: TrainConfig) -> None:
    """Train, and say where the model is and how well it codes held-out text."""
    result = train(options)
    for level, figure in result.evaluation["levels"].items():
        print(f"held-out bits per byte, level {level:<8}{figure['bits']:.4f} ± {figure['standard_error']:.4f}")
    skipped = f", {result.skipped} left out" if result.skipped else ""
    print(f"{result.steps} steps{skipped}; the model is in {options.out / 'model'}", file=sys.stderr)
