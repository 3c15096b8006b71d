"""Quality against the number of steps and the solver; and, with --grid, against steps and size with operations counted.

    python -m benchmarks.ablation.steps --tasks star-2x5 shakespeare --budget 2M
    python -m benchmarks.ablation.steps --grid --sizes nano micro mini --tasks shakespeare --budget 2M

Of trained rows, at their own levels and at t ≡ 1: exact match of puzzles; of text the perplexity under another model
beside the entropy of the samples. The grid is the paper's figure 2 at small sizes.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm

from benchmarks.ablation.corpora import CORPORA
from benchmarks.ablation.flops import counter
from benchmarks.ablation.options import parser
from benchmarks.ablation.samples import PRIOR, read
from benchmarks.ablation.scoring import graded, write
from benchmarks.ablation.sizes import SIZES
from benchmarks.ablation.steps_report import EVALUATIONS, OPERATIONS, write_report
from benchmarks.ablation.subjects import Subject, subjects
from benchmarks.ablation.tasks import TASKS
from evo import Evo
from evo.solvers import Ancestral, Euler, Exponential, ExponentialMultistep, Heun, Solver, TorchDiffEq
from evo.training.curriculum import PATHS

TABLE, GRID = "steps", "grid"
DEFAULT = ("star-2x5", "sudoku-4", "addition-6", "parity-12", "total-first-12", "chain-5")
LEVELS: Mapping[str, float | None] = {"own": None, "1": 1.0}
STEPS = (1, 2, 5, 10, 20, 40)
GRID_STEPS = (5, 10, 20)
GRID_SIZES = ("nano", "micro", "mini")
TOLERANCE = 1e-3

SOLVERS: Mapping[str, Callable[[Evo], Solver]] = {
    "Euler": lambda model: Euler(),
    "Heun": lambda model: Heun(),
    "ExponentialMultistep": lambda model: ExponentialMultistep(schedule=model.schedule),
    "Exponential": lambda model: Exponential(schedule=model.schedule),
    "Ancestral": lambda model: Ancestral(schedule=model.schedule),
    "dopri5": lambda model: TorchDiffEq("dopri5", rtol=TOLERANCE, atol=TOLERANCE),
}


def quality(
    subject: Subject,
    model: Evo,
    reader: Evo | None,
    *,
    solver: str,
    level: float | None,
    max_steps: int,
    count_operations: bool = False,
) -> dict[str, Any]:
    """What the text written in K = `max_steps` steps is worth, with network evaluations and, if asked for, operations a token written.

    `level` None is the model's own. The operations are those of sketch and refinement.
    """
    row, data = subject.row, subject.data
    with counter() if count_operations else nullcontext() as counting:
        tokens, written = write(
            model,
            data,
            plan=PATHS[row.curriculum.path],
            level=level,
            max_steps=max_steps,
            solver=SOLVERS[solver](model),
            prior=None if reader is None else PRIOR,
            count=None if reader is None else row.samples,
            seed=row.seed,
        )
    found = graded(data, tokens, written) if reader is None else read(reader, tokens, written)
    if counting is not None:
        found["flops_per_token"] = counting.get_total_flops() / written.tokens.numel()
    return found


def examine(subject: Subject) -> dict[str, Any]:
    """One trained row by every solver in every number of steps."""
    return {"written": _written(subject, list(SOLVERS), STEPS, count_operations=False)}


def examine_in_grid(subject: Subject) -> dict[str, Any]:
    """One trained row by Euler's method, with operations counted."""
    training = subject.result()["training"]
    return {
        "training": {name: training[name] for name in ("parameters", "tokens", "flops")},
        "written": _written(subject, ["Euler"], GRID_STEPS, count_operations=True),
    }


def _written(
    subject: Subject, solvers: list[str], steps: tuple[int, ...], *, count_operations: bool
) -> list[dict[str, Any]]:
    model, reader = subject.model(), subject.reader()
    asked = list(itertools.product(LEVELS, solvers, steps))
    bar = tqdm(asked, desc=subject.row.name, unit="text", disable=None if subject.progress else True, leave=False)
    return [
        {"levels": levels, "solver": solver, "steps": max_steps}
        | quality(
            subject,
            model,
            reader,
            solver=solver,
            level=LEVELS[levels],
            max_steps=max_steps,
            count_operations=count_operations,
        )
        for levels, solver, max_steps in bar
    ]


def main() -> None:
    options = parser(__doc__ or "", {**TASKS, **CORPORA}, DEFAULT, budget=2_000_000)
    options.set_defaults(variants=["learned"])
    options.add_argument(
        "--grid", action="store_true", help="steps and sizes with operations counted, instead of solvers"
    )
    options.add_argument(
        "--sizes", choices=list(SIZES), nargs="+", default=list(GRID_SIZES), help="of the grid, in place of --size"
    )
    given = options.parse_args()
    if not given.grid:
        for subject in subjects(given):
            subject.examined(TABLE, {"solvers": list(SOLVERS), "steps": list(STEPS), "tolerance": TOLERANCE}, examine)
        print(write_report(given.results, TABLE, EVALUATIONS))
        return
    for size in given.sizes:
        for subject in subjects(Namespace(**{**vars(given), "size": size})):
            subject.examined(GRID, {"steps": list(GRID_STEPS)}, examine_in_grid)
    print(write_report(given.results, GRID, OPERATIONS))


if __name__ == "__main__":
    main()
