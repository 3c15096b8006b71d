"""What a path owes the library: as a plan for generation, and as a path for the bound."""

from __future__ import annotations

import torch
from torch import Tensor

from evo.schedules import Path
from evo.testing.errors import require, require_all, require_close


def check_plan(path: Path, *, tokens: int = 6, t_min: float = 0.1) -> None:
    """Hold a path to what the bound and generation rely on, for levels of every kind: 0, 1, below t_min, on and off the grid.

    As a plan for `tokens` positions, its first row is t for the tokens that take a step and 0 for the others, no row rises, the
    last is 0. As a path, it runs from t at clock 0 to t_min at clock 1, its rate is the speed at which it falls, it moves nowhere
    outside its `stretch`, and the rows of the plan lie on it.

    Raises PropertyError, naming the property, the level and the row.
    """
    for max_steps in (1, 2, 7, 20):
        levels = _levels(tokens, max_steps, t_min)
        _check_rows(path(levels, max_steps, t_min), levels, max_steps)
        _check_rows_on_path(path, levels, max_steps, t_min)
    levels = _levels(tokens, 20, t_min)
    _check_path(path, levels, t_min)


def _levels(tokens: int, max_steps: int, t_min: float) -> Tensor:
    """Levels (B, tokens), every special value at every position."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.arange(max_steps + 1, dtype=torch.float64) / max_steps
    special = torch.tensor([0.0, 1.0, t_min, t_min / 2, 0.999], dtype=torch.float64)
    values = torch.cat([special, grid, torch.rand(24, generator=generator, dtype=torch.float64)])
    return torch.stack([values.roll(7 * i) for i in range(tokens)], dim=1)


def _check_rows(plan: Tensor, levels: Tensor, max_steps: int) -> None:
    batch, tokens = levels.shape
    shape = (batch, max_steps + 1, tokens)
    claim = "a plan has one row per step and one before them"
    require(claim, plan.shape == shape, f"needed {shape}, got {tuple(plan.shape)}")
    require("a plan keeps the dtype of its levels", plan.dtype == levels.dtype, f"{levels.dtype} gave {plan.dtype}")
    first = torch.where((max_steps * levels + 1e-6).floor() >= 1, levels, torch.zeros_like(levels))
    claim = f"a plan of {max_steps} steps starts at t where K·t >= 1, and at 0 elsewhere"
    require_close(claim, plan[:, 0], first, 1e-12, level=levels)
    last = plan[:, -1]
    require_close(f"a plan of {max_steps} steps ends at 0", last, torch.zeros_like(last), 0.0, level=levels)
    row = torch.arange(1, max_steps + 1)[:, None].expand(max_steps, tokens)
    require_all(f"no row of a plan of {max_steps} steps rises", plan.diff(dim=1) <= 0, level=levels[:, None], row=row)


def _check_rows_on_path(path: Path, levels: Tensor, max_steps: int, t_min: float) -> None:
    plan = path(levels, max_steps, t_min)
    for k in range(max_steps):
        row, clock = plan[:, k], levels.new_full((len(levels),), k / max_steps)
        on_path = (row - path.at(levels, clock, t_min)[0]).abs() <= 1e-12
        claim = f"row {k} of a plan of {max_steps} steps is t while a token waits, then on the path at clock {k}/{max_steps}, then 0"
        require_all(claim, on_path | (row == levels) | (row == 0), level=levels, row=row)


def _check_path(path: Path, levels: Tensor, t_min: float) -> None:
    points = 4096
    clock = (torch.arange(points, dtype=levels.dtype) + 0.5) / points
    batch, tokens = levels.shape
    level, rate = (
        x.view(points, batch, tokens) for x in path.at(levels.repeat(points, 1), clock.repeat_interleave(batch), t_min)
    )
    ends = torch.tensor([0.0, 1.0], dtype=levels.dtype)
    first, last = (path.at(levels, end.expand(batch), t_min)[0] for end in ends)
    lowest = levels.clamp(max=t_min)
    require_close("a path starts at t", first, levels, 1e-9, level=levels)
    require_close("a path ends at t_min, or stays at a lower t", last, lowest, 1e-9, level=levels)
    at = {"level": levels, "clock": clock[:, None, None]}
    require_all("a path stays between t_min and t", (level >= lowest - 1e-12) & (level <= levels + 1e-12), **at)
    require_all("a path never rises", level.diff(dim=0) <= 1e-12, level=levels, clock=clock[1:, None, None])
    require_all("the rate of a path is not negative", rate >= 0, **at)
    begin, end = (x[None, :, None] for x in _stretch(path, levels, t_min))
    outside = (clock[:, None, None] < begin - 1e-9) | (clock[:, None, None] > end + 1e-9)
    require_all("nothing moves outside the stretch of a path", ~outside | (rate == 0), **at, rate=rate)
    # Rates are constant between few kinks, so a midpoint sum misses the integral by a few cells at most.
    fallen = rate.cumsum(0) / points
    slack = 4 * rate.amax().item() / points
    require_close("the rate of a path is the speed at which it falls", levels - fallen, level, slack, **at)


def _stretch(path: Path, levels: Tensor, t_min: float) -> tuple[Tensor, Tensor]:
    begin, end = path.stretch(levels, t_min)
    shapes = f"levels {tuple(levels.shape)} gave {tuple(begin.shape)} and {tuple(end.shape)}"
    claim = "the stretch of a path is a begin and an end for each sequence"
    require(claim, begin.shape == end.shape == (len(levels),), shapes)
    ordered = (begin >= 0) & (begin <= end) & (end <= 1)
    require_all("the stretch of a path lies in [0, 1]", ordered, begin=begin, end=end)
    return begin, end
