"""What a solver of one's own returns is looked at, whoever takes its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from evo.solvers import Euler, Solver, integrate
from evo.solvers.base import check_steps
from evo.testing import PropertyError, check_solver


def decay(latents: Tensor, level: Tensor) -> Tensor:
    return -latents


@dataclass(frozen=True, kw_only=True)
class NoState(Euler):
    """A batch of two would itself be taken for latents and a state."""

    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> Any:
        return super().step(field, latents, level, next_level, state)[0]


@dataclass(frozen=True, kw_only=True)
class Three(Euler):
    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> Any:
        return (*super().step(field, latents, level, next_level, state), None)


@dataclass(frozen=True, kw_only=True)
class Nothing(Euler):
    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> Any:
        return None, None


@dataclass(frozen=True, kw_only=True)
class FirstToken(Euler):
    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> Any:
        moved, state = super().step(field, latents, level, next_level, state)
        return moved[:, :1], state


@dataclass(frozen=True, kw_only=True)
class Widens(Euler):
    def step(self, field: Any, latents: Tensor, level: Tensor, next_level: Tensor, state: Any) -> Any:
        moved, state = super().step(field, latents, level, next_level, state)
        return moved.double(), state


CASES = [
    (NoState(), TypeError, r"NoState.step must return a pair, latents and a state .*, got Tensor alone"),
    (Three(), TypeError, r"Three.step must return a pair, .* got 3 values"),
    (Nothing(), TypeError, r"Nothing.step must return a tensor of latents, got NoneType"),
    (FirstToken(), ValueError, r"FirstToken.step must return latents of shape \(2, 3, .\), got shape \(2, 1, .\)"),
    (Widens(), TypeError, r"Widens.step must return torch.float32 on cpu, like its latents, got torch.float64"),
]


@pytest.mark.parametrize(("solver", "error", "message"), CASES, ids=lambda value: type(value).__name__)
def test_a_step_that_returns_something_else_is_named(solver: Euler, error: type[Exception], message: str) -> None:
    latents, level = torch.ones(2, 3, 4), torch.ones(2, 3)
    with pytest.raises(error, match=message):
        solver.advance(decay, latents, level, level / 2, None)
    with pytest.raises(error, match=message):
        integrate(decay, latents, 1.0, solver=type(solver)(steps=2))
    with pytest.raises(PropertyError, match=f"a step returns latents like those it was given, and a state: {message}"):
        check_solver(solver)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "Own.solve must return a Solution, got NoneType"),
        (torch.ones(2, 1, 4), r"Own.solve must return latents of shape \(2, 3, 4\), got shape \(2, 1, 4\)"),
    ],
)
def test_a_solve_that_returns_something_else_is_named(returned: Any, message: str) -> None:
    class Own(Solver):
        def solve(self, problem: Any) -> Any:
            solution = Euler(steps=1).solve(problem)
            return None if returned is None else type(solution)(**{**vars(solution), "latents": returned})

    with pytest.raises((TypeError, ValueError), match=message):
        integrate(decay, torch.ones(2, 3, 4), 1.0, solver=Own())


def test_true_is_no_number_of_steps() -> None:
    with pytest.raises(ValueError, match="got steps=True"):
        Euler(steps=True)
    with pytest.raises(ValueError, match="got steps=True"):
        check_steps("rk4", True)
