"""What a solver owes the library."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from evo.schedules import Cosine, Schedule
from evo.solvers import FixedStep, Solver, integrate
from evo.testing.errors import PropertyError, require, require_close, require_equal
from evo.testing.targets import Gaussian, uneven_gaussian

STEPS = (32, 64, 128)
LEVELS = torch.tensor([[0.85, 0.7, 0.9], [0.6, 0.8, 0.75]], dtype=torch.float64)
SCALAR_SPAN = torch.full_like(LEVELS, 0.8), torch.full_like(LEVELS, 0.2)
TOKEN_SPANS = LEVELS, LEVELS * torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def check_solver(
    solver: Solver | Callable[[int], Solver],
    *,
    order: float | None = None,
    tolerance: float | None = None,
    schedule: Schedule | None = None,
) -> None:
    """Hold a deterministic solver to what `integrate` and `generate` rely on.

    The problem is the probability flow of a Gaussian, whose solution is known, from one level for all tokens and from a level per
    token. Fixed steps converge at their order within ±0.2, by regression in float64; an adaptive solver stays within its
    tolerance. Every solver keeps dtypes, gives the same answer twice, solves each token as if it were alone, and returns frozen
    tokens bit for bit even where the field is NaN; a `FixedStep` can be walked step by step.

    Args:
        solver: a `FixedStep`; a function from a number of steps to a solver, with `order`; or an adaptive one, with `tolerance`.
        order: at which the error falls with the number of steps; None is that of the solver.
        tolerance: of the latents, which are of unit size; given, it is checked in the place of the order.
        schedule: of the flow; None is `Cosine()`. An exponential solver must have the same one.

    Raises PropertyError, naming the property and the error; ValueError where neither an order nor a tolerance is known.
    """
    target = uneven_gaussian(schedule or Cosine())
    if isinstance(solver, Solver) and tolerance is not None:
        for spans in (SCALAR_SPAN, TOKEN_SPANS):
            require_close("an adaptive solve stays within its tolerance", *_solve(solver, target, *spans), tolerance)
        _check_contract(solver, target, tolerance)
        return
    make: Callable[[int], Solver]
    if isinstance(solver, FixedStep):
        fixed = solver
        make, order = lambda steps: dataclasses.replace(fixed, steps=steps), solver.order if order is None else order
    elif isinstance(solver, Solver) or order is None:
        raise ValueError(f"{solver!r} needs a `tolerance`; a function from steps to a solver needs an `order`")
    else:
        make = solver
    _check_contract(make(8), target, 1e-12)
    for spans in (SCALAR_SPAN, TOKEN_SPANS):
        _check_order(make, order, target, *spans)


def check_marginals(solver: Solver, *, schedule: Schedule | None = None, start: float = 0.99, end: float = 0.2) -> None:
    """Hold a solver, stochastic or not, to the marginals of the flow; give it steps enough that its bias is small.

    16 384 samples of a Gaussian noised to level `start` and taken to `end` have the mean and the variance of the Gaussian noised to
    `end`, within 4 standard errors and half a percent for the bias. Nothing is drawn from torch's own generator.

    Raises PropertyError, naming the moment and the error.
    """
    target = uneven_gaussian(schedule or Cosine())
    levels = torch.full((128, 128), start, dtype=torch.float64), torch.full((128, 128), end, dtype=torch.float64)
    before = torch.get_rng_state()
    latents = _solve(solver, target, *levels)[0].flatten(0, 1)
    require(
        "a solver draws from its own generator alone", torch.equal(before, torch.get_rng_state()), "torch's own moved"
    )
    mean, variance = (moment[0, 0] for moment in target.moments(levels[1]))
    off, ratio = (latents.mean(0) - mean) / variance.sqrt(), latents.var(0) / variance
    error, none = 4 / len(latents) ** 0.5, torch.zeros_like(mean)
    dimension = torch.arange(len(mean))
    claim = f"the mean at level {end} is that of the flow, in standard deviations"
    require_close(claim, off, none, error + 5e-3, dimension=dimension)
    claim = f"the variance at level {end} is that of the flow, as a ratio"
    require_close(claim, ratio, none + 1, (2**0.5 * error + 5e-3) / 2, dimension=dimension)  # relative to 1 + 1


def _generator() -> torch.Generator:
    """Of starting latents. Its seed is unusual: they must not be the very noise that a sampler with a usual one will draw."""
    return torch.Generator().manual_seed(0x1A7E27)


def _solve(solver: Solver, target: Gaussian, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """What the solver finds, and the exact solution."""
    latents = target.sample(start, 2, _generator())
    found = integrate(target.velocity, latents, start, end, solver=solver).latents
    return found, target.transport(latents, start, end)


def _check_contract(solver: Solver, target: Gaussian, tolerance: float) -> None:
    """Everything but accuracy."""
    if isinstance(solver, FixedStep):
        _check_returned(solver, target)
    _check_repeatable(solver, target)
    _check_frozen(solver, target)
    _check_tokens_alone(solver, target, tolerance)
    if isinstance(solver, FixedStep):
        _check_rows(solver, target)


def _check_order(make: Callable[[int], Solver], order: float, target: Gaussian, start: Tensor, end: Tensor) -> None:
    errors = []
    for steps in STEPS:
        found, exact = _solve(make(steps), target, start, end)
        errors.append((found - exact).abs().max().item())
    told = f"errors {', '.join(f'{error:.2e}' for error in errors)} with {STEPS} steps"
    require("more steps come closer to the solution", 0 < errors[-1] < errors[0], told)
    x, y = [math.log(steps) for steps in STEPS], [math.log(error) for error in errors]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    require(
        f"the order of convergence is {order:g} ± 0.2", abs(-slope - order) <= 0.2, f"measured {-slope:.2f}, {told}"
    )


def _check_tokens_alone(solver: Solver, target: Gaussian, tolerance: float) -> None:
    start, end = TOKEN_SPANS
    latents = target.sample(start, 2, _generator())
    together = integrate(target.velocity, latents, start, end, solver=solver).latents
    for b in range(start.shape[0]):
        for i in range(start.shape[1]):
            one = (slice(b, b + 1), slice(i, i + 1))
            alone = integrate(target.velocity, latents[one], start[one], end[one], solver=solver).latents
            require_close(
                "a token is solved as if it were alone", together[one], alone, tolerance, start=start[one][..., None]
            )


def _check_frozen(solver: Solver, target: Gaussian) -> None:
    start = LEVELS
    frozen = torch.tensor([[True, False, True], [False, True, False]])
    end = torch.where(frozen, start, 0.2)

    def field(latents: Tensor, level: Tensor) -> Tensor:
        return torch.where(frozen[..., None], torch.nan, target.velocity(latents, level))

    latents = target.sample(start, 2, _generator())
    found = integrate(field, latents, start, end, solver=solver).latents
    require_equal(
        "a frozen token comes back bit for bit, whatever the field says of it", found[frozen], latents[frozen]
    )


def _check_repeatable(solver: Solver, target: Gaussian) -> None:
    for dtype in (torch.float32, torch.float64):
        start, end = (x.to(dtype) for x in TOKEN_SPANS)
        narrow = dataclasses.replace(target, mean=target.mean.to(dtype), variance=target.variance.to(dtype))
        latents = narrow.sample(start, 2, _generator())
        given = latents.clone()
        first, second = (integrate(narrow.velocity, latents, start, end, solver=solver).latents for _ in range(2))
        require("a solve keeps the dtype of its latents", first.dtype == dtype, f"{dtype} became {first.dtype}")
        require_equal("a solve leaves the latents it was given as they were", latents, given)
        require_equal("a solver remembers nothing from one solve to the next", second, first)


def _check_returned(solver: FixedStep, target: Gaussian) -> None:
    start, end = (x.float() for x in TOKEN_SPANS)
    latents = target.sample(TOKEN_SPANS[0], 2, _generator()).float()

    def field(latents: Tensor, level: Tensor) -> Tensor:
        return target.velocity(latents.double(), level.double()).float()

    try:
        solver.advance(field, latents, start, end, None)
    except (TypeError, ValueError) as error:
        raise PropertyError(f"a step returns latents like those it was given, and a state: {error}") from error


def _check_rows(solver: FixedStep, target: Gaussian) -> None:
    """`generate` walks the rows of a plan itself, and rows may repeat."""
    start, end = TOKEN_SPANS
    latents = target.sample(start, 2, _generator())
    whole = integrate(target.velocity, latents, start, end, solver=solver).latents
    steps = solver.steps or 1
    level, state, walked = start, None, latents
    for k in range(1, steps + 1):
        next_level = torch.lerp(start, end, k / steps)
        walked, state = solver.advance(target.velocity, walked, level, next_level, state)
        level = next_level
    require_close("walking by `step` is what `integrate` does", walked, whole, 1e-10)
    waiting, _ = solver.advance(target.velocity, latents, start, start, None)
    require_close("a step of no length moves nothing", waiting, latents, 1e-9)
