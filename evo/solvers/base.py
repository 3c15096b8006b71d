"""Moving latents along a vector field: `integrate`, and what a solver is.

Every token has a span of levels of its own, start_i to end_i. All of them share one clock u, which runs from 0 to 1:
τ_i = start_i + u·(end_i − start_i). Shapes: B sequences, N tokens, D latent dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from .contract import Problem, Velocity, check, check_like
from .protocols import Callback, Field
from .record import Record
from .solution import Solution, SolverError


class Solver(ABC):
    """A method that takes latents from one level to another. A small frozen object: what changes lives in `solve`."""

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """Solve a checked problem. Callers use `integrate`, which checks arguments before and results after."""


def integrate(
    field: Field,
    latents: Tensor,
    start: float | Tensor,
    end: float | Tensor = 0.0,
    *,
    solver: Solver,
    callback: Callback | None = None,
    throw: bool = True,
    trajectory: bool = False,
) -> Solution:
    """Move `latents` along `field` from level `start` to level `end`.

    `field(latents, level)` returns d latents / d level (B, N, D) and always sees levels (B, N). `latents` is (B, N, D),
    float32 or float64. `start` and `end` are levels in [0, 1]: a number, (B,) for one per sequence, or (B, N) for one
    per token. A token whose start equals its end is frozen: it comes back bit for bit, whatever the field says of it.

    `callback(step, level, latents)` is called after every step, from step 1 on; a true result ends the solve there.
    `trajectory` keeps the state after every step.

    A live token that becomes NaN or infinite raises `SolverError`, which names it and its level; with `throw=False` it
    is told in `Solution.status` instead. Looking for the level costs a reduction per step with `throw=False`; otherwise
    a solve that has failed is repeated for it, without gradients and callback, unless torch.distributed runs. Under
    `torch.compile` no values are looked at: neither a level out of range nor a NaN raises.

    Raises TypeError or ValueError for arguments, velocities or what the solver returns of the wrong kind, shape, dtype,
    device or range.
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a solver such as Euler(steps=20), got {solver!r}")
    problem = check(field, latents, start, end, callback=callback, trajectory=trajectory, watch=not throw)
    solution = solver.solve(problem)
    name = type(solver).__name__
    if not isinstance(solution, Solution):
        raise TypeError(f"{name}.solve must return a Solution, got {type(solution).__name__}")
    check_like(f"{name}.solve", "latents", solution.latents, latents)
    if throw and not torch.compiler.is_compiling():
        _raise_if_failed(solver, problem, solution)
    return solution


def _raise_if_failed(solver: Solver, problem: Problem, solution: Solution) -> None:
    """Raise SolverError where a live token is lost. One sum and one synchronisation where all is well."""
    if solution.failed_at is None:
        if bool(solution.latents.detach().sum().isfinite()) or not bool(problem.lost(solution.latents).any()):
            return
        if dist.is_available() and dist.is_initialized():  # other ranks would not take part in repeating the solve
            raise SolverError(f"{solver!r}: latents became NaN or infinite; solve with throw=False to learn where")
        with torch.no_grad():
            solution = solver.solve(replace(problem, watch=True, callback=None, trajectory=False))
    raise SolverError(f"{solver!r}: {solution.failure or 'NaN or infinity came, but not again when repeated'}")


@dataclass(frozen=True, kw_only=True)
class FixedStep(Solver):
    """A method that divides every span into `steps` equal parts. A subclass defines `step` and `order`.

    A plan is walked from one row to the next by `advance`; `steps` may then stay unset.
    Raises ValueError for `steps` below 1, and in `integrate` for `steps` unset.
    """

    order: ClassVar[int]
    """The power p with which the error falls, as steps^−p."""

    steps: int | None = None

    def __post_init__(self) -> None:
        check_steps(type(self).__name__, self.steps)

    @abstractmethod
    def step(self, field: Field, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The latents (B, N, D) at `next_level`, from those at `level`, both (B, N), and a state for the next step.

        `state` is what the step before returned, None in the first: a method remembers by it, and holds nothing itself.
        A token whose two levels are equal must stay where it is, up to rounding.
        """

    def drawing(self, generators: Callable[[], Sequence[torch.Generator]]) -> FixedStep:
        """This method as it draws from one generator for each sequence; itself, and nobody is asked, if it draws nothing.

        `Evo.generate` and `Evo.edit` call it for every row of a plan, with streams of that row.
        """
        return self

    def advance(
        self, field: Field, latents: Tensor, level: Tensor, next_level: Tensor, state: Any
    ) -> tuple[Tensor, Any]:
        """One `step`, and a look at the kind of what it returns: what callers take a step by.

        Raises TypeError unless that is a pair, latents and a state; TypeError or ValueError unless its latents are of
        the shape, dtype and device of those given.
        """
        stepped, name = self.step(field, latents, level, next_level, state), f"{type(self).__name__}.step"
        if not isinstance(stepped, tuple) or len(stepped) != 2:
            given = f"{len(stepped)} values" if isinstance(stepped, tuple) else f"{type(stepped).__name__} alone"
            raise TypeError(
                f"{name} must return a pair, latents and a state (None if it remembers nothing), got {given}"
            )
        check_like(name, "latents", stepped[0], latents)
        return stepped

    def solve(self, problem: Problem) -> Solution:
        """Walk `steps` equal steps. Compiles whole: no branch looks at a value."""
        if self.steps is None:
            raise ValueError(f"integrate needs to know how many steps to take: {type(self).__name__}(steps=...)")
        clock = torch.linspace(0, 1, self.steps + 1, dtype=problem.latents.dtype, device=problem.latents.device)
        inner = torch.addcmul(problem.start, clock[1:-1].view(-1, 1, 1), problem.end - problem.start)
        velocity, record, state = Velocity(problem), Record(problem), None
        for next_level in (*inner.unbind(0), problem.end):
            latents, state = self.advance(velocity, record.latents, record.level, next_level, state)
            if record.arrive(latents, next_level):
                break
        return record.solution(velocity.nfe)


def check_steps(name: str, steps: int | None) -> None:
    """Raise ValueError unless `steps` is None or a whole number from 1 on."""
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"{name} needs a whole number of steps from 1 on, got steps={steps!r}")
