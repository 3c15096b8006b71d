"""Paths and plans: how the tokens of a window fall from their levels to 0, together, on one clock.

A token sketched at level t has K_i = ⌊K·t⌋ of K steps to take. A `Path` says where it is at clock c in [0, 1] by a
ramp, a function that falls in c and may leave [0, t]. The rest follows from it:

- in the bound, τ(c) is the ramp held within [t_min, t], and −dτ/dc the ramp's own while it moves, else 0 (`Path.at`);
- in generation, row k of the plan is the ramp at c = k/K held within [t_min, t], except that a token stands at t up to
  the row where its steps begin and is 0, a word, from the row where they end (`Path.__call__`).

A token whose t is below t_min does not fall in the bound; in a plan it waits at t until it becomes 0.
Dimensions: B sequences, N tokens, K steps, R values of the clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import check_levels


def step_counts(levels: Tensor, max_steps: int) -> Tensor:
    """K_i = ⌊K·t_i⌋, int64 of the shape of `levels`, where a level within rounding of the grid k/K counts as on it.

    The margin is 1e-6 of a step and two roundings of the level: 100·0.58 is 57.999998 in float32.
    """
    margin = 1 + 2 * torch.finfo(levels.dtype).eps
    return (levels * (max_steps * margin) + 1e-6).floor().long().clamp(max=max_steps)


def check_rows(rows: Tensor, levels: Tensor, max_steps: int) -> None:
    """Hold the plan that any rule made for `levels` (B, N) and K = `max_steps` to what a walk along its rows needs.

    `rows` are levels (B, K+1, N), of the dtype and device of `levels`. Row 0 is t, or 0 where t is worth no step
    (K·t < 1); no row rises, and the last is 0: a token that does not arrive there would never be written. TypeError or
    ValueError otherwise. Looks at values once: for once a plan, not for every row.
    """
    wanted = (len(levels), max_steps + 1, *levels.shape[1:])
    if not isinstance(rows, Tensor) or rows.dtype != levels.dtype or rows.device != levels.device:
        given = f"{rows.dtype} on {rows.device}" if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"the plan is {given}: needs a tensor like its levels, {levels.dtype} on {levels.device}.")
    if rows.shape != wanted:
        raise ValueError(
            f"the plan has shape {tuple(rows.shape)}: for levels {tuple(levels.shape)} and max_steps = {max_steps} it "
            f"needs one row before every step and one behind the last, {wanted}."
        )
    start, end = rows[:, 0], rows[:, -1]
    starts = (start == levels) | ((start == 0) & (step_counts(levels, max_steps) == 0))
    falls = (rows[:, 1:] <= rows[:, :-1]).all(1)  # which NaN does not
    right = starts & falls & (end == 0)
    if right.all():
        return
    first = tuple((~right).nonzero()[0].tolist())
    path = ", ".join(f"{level:.6g}" for level in rows[first[0], :, first[1]].tolist())
    raise ValueError(
        f"the plan is wrong for {int((~right).sum())} of {right.numel()} tokens, the first {first} (sequence, position) "
        f"of level {levels[first].item():.6g}, whose rows are {path}: they must start at that level (or at 0 where "
        "max_steps times it is below 1), never rise, and end at 0."
    )


@dataclass(frozen=True, kw_only=True)
class Path(ABC):
    """A rule by which tokens mature. One's own path defines `ramp`, and `span` if its tokens do not use every row."""

    @abstractmethod
    def ramp(self, levels: Tensor, clock: Tensor, t_min: float) -> tuple[Tensor, Tensor]:
        """Where tokens of `levels` (B, 1, N) head for at `clock` (B or 1, R, 1), and minus its derivative in the clock.

        Both broadcast to (B, R, N). A ramp falls in the clock and starts at t or above.
        """

    def span(self, levels: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
        """The row up to which each token of `levels` (B, 1, N) waits at t, and the row from which it is 0."""
        return torch.zeros_like(levels), torch.full_like(levels, max_steps)

    def at(self, levels: Tensor, clock: Tensor, t_min: float = 0.1) -> tuple[Tensor, Tensor]:
        """(τ, −dτ/dc), each (B, N): where tokens of `levels` (B, N) are at `clock` (B,) or (B, 1), and their speed.

        τ lies in [t_min, t]; where t ≤ t_min it is t. The derivative is taken from the right: 0 while a token waits,
        and once it has arrived. ValueError for shapes that do not fit.

        The gradient in `levels` is taken with every moving token held at its share of the way from t_min to t. Held at
        its place on the clock instead, as written, a token whose speed does not depend on t would tell its level
        nothing of the stretch that a higher level adds. So it is the slope of a bound whose path keeps these shares; for
        ideal predictors, and for one token alone, that of every path.
        """
        if levels.dim() != 2 or clock.shape not in ((len(levels),), (len(levels), 1)):
            raise ValueError(
                f"levels of shape {tuple(levels.shape)} with a clock of shape {tuple(clock.shape)}: "
                "a path needs levels (B, N) and a clock (B,) or (B, 1)."
            )
        held = levels.detach()
        ramp, speed = (x.squeeze(1) for x in self.ramp(held.unsqueeze(1), clock.reshape(-1, 1, 1), t_min))
        moving = (ramp <= held) & (ramp > held.clamp(max=t_min))
        length = torch.where(moving, held - t_min, 1.0)
        longer = (levels - held) / length  # 0; its gradient is that of the logarithm of the way
        level = torch.where(moving, ramp + (ramp - t_min).detach() * longer, levels.clamp(max=t_min))
        level = torch.where(ramp > held, levels, level)
        return level, torch.where(moving, speed * (1 + longer), 0.0)

    def stretch(self, levels: Tensor, t_min: float = 0.1) -> tuple[Tensor, Tensor]:
        """The part of the clock, from (B,) to (B,), outside which no token of `levels` (B, N) moves.

        The bound draws its clock there alone, and what moves outside is lost to it: too wide a part costs variance, too
        narrow a one makes the bound too low. All of [0, 1], as here, is always right.
        """
        return levels.new_zeros(len(levels)), levels.new_ones(len(levels))

    def __call__(self, levels: Tensor, max_steps: int, t_min: float = 0.1) -> Tensor:
        """The plan (B, K+1, N) of `levels` (B, N) in K = `max_steps` steps; step k leads from row k to row k + 1.

        Row 0 is t where K_i ≥ 1 and 0 elsewhere, the last row is 0, and rows never rise. Step k is one of a token's
        own steps if the token is not 0 at row k and no longer waits (`span`); where t_min is wider than 1/K, the steps
        before the last may stay at t_min. Raises ValueError unless `levels` is (B, N) in [0, 1] and K ≥ 1, TypeError
        for levels that are no floating-point tensor.
        """
        check_levels(levels)
        if levels.dim() != 2:
            raise ValueError(f"levels has shape {tuple(levels.shape)}: a plan needs one level per token, (B, N).")
        if max_steps < 1:
            raise ValueError(f"max_steps = {max_steps}: a plan needs at least one step.")
        levels = levels.detach().unsqueeze(1)
        start = torch.where(step_counts(levels, max_steps) > 0, levels, 0.0)
        row = torch.arange(max_steps + 1, dtype=levels.dtype, device=levels.device).view(1, -1, 1)
        ramp, _ = self.ramp(levels, row / max_steps, t_min)
        wait, end = self.span(levels, max_steps)
        # Rounding of the ramp is neither a departure nor a step: a token that waits or has arrived must not seem to move.
        waiting, floor = (row <= wait) | (ramp >= start - 1e-6), start.clamp(max=t_min)
        held = torch.where(waiting, start, torch.where(ramp <= floor + 1e-6, floor, ramp))
        return torch.where(row >= end, 0.0, held).detach()


@dataclass(frozen=True, kw_only=True, repr=False)
class EarlyStop(Path):
    """Tokens start together and fall at one speed: K_i steps of 1/K, the remainder of the level in the last."""

    def ramp(self, levels: Tensor, clock: Tensor, t_min: float) -> tuple[Tensor, Tensor]:
        return levels - clock, torch.ones_like(clock)

    def span(self, levels: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(levels), step_counts(levels, max_steps)

    def stretch(self, levels: Tensor, t_min: float = 0.1) -> tuple[Tensor, Tensor]:
        return levels.new_zeros(len(levels)), (levels.amax(1) - t_min).clamp(min=0)

    def __repr__(self) -> str:
        return "early_stop"


@dataclass(frozen=True, kw_only=True, repr=False)
class LateStart(Path):
    """Tokens finish together: each waits, then takes K_i steps of 1/K, the remainder of the level in the first."""

    def ramp(self, levels: Tensor, clock: Tensor, t_min: float) -> tuple[Tensor, Tensor]:
        return 1 - clock, torch.ones_like(clock)

    def span(self, levels: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
        return max_steps - step_counts(levels, max_steps), torch.full_like(levels, max_steps)

    def stretch(self, levels: Tensor, t_min: float = 0.1) -> tuple[Tensor, Tensor]:
        return 1 - levels.amax(1).clamp(min=t_min), levels.new_full((len(levels),), 1 - t_min)

    def __repr__(self) -> str:
        return "late_start"


@dataclass(frozen=True, kw_only=True, repr=False)
class Full(Path):
    """Every token falls evenly from its own level to t_min over the whole clock, in K steps if its level is worth one.

    In a plan a token with K·t < 1 is 0 from the start, as on every path.
    """

    def ramp(self, levels: Tensor, clock: Tensor, t_min: float) -> tuple[Tensor, Tensor]:
        length = (levels - t_min).clamp(min=0)
        return levels - clock * length, length

    def __repr__(self) -> str:
        return "full"


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ByOrder(Path):
    """Tokens mature in turn: each falls while the clock runs from o·(1 − w) to o·(1 − w) + w. See `by_order`."""

    order: Tensor
    """The turn o at which each token matures, (N,) or (B, N) in [0, 1]."""
    width: float
    """The share w of the clock that a fall from 1 to 0 takes, in (0, 1]."""

    def __post_init__(self) -> None:
        check_levels(self.order, "order")
        if self.order.dim() not in (1, 2):
            raise ValueError(f"order has shape {tuple(self.order.shape)}: needs one turn per token, (N,) or (B, N).")
        if not 0 < self.width <= 1:
            raise ValueError(f"width = {self.width!r}: needs a share of the clock in (0, 1].")

    def _begin(self, levels: Tensor) -> Tensor:
        """The clock at which a token at level 1 begins to fall, broadcastable to `levels` (B, 1, N)."""
        batch, _, tokens = levels.shape
        if self.order.shape not in ((tokens,), (batch, tokens)):
            needed = f"needs ({tokens},) or ({batch}, {tokens}) for levels ({batch}, {tokens})"
            raise ValueError(f"order has shape {tuple(self.order.shape)}: {needed}.")
        return self.order.to(levels).unsqueeze(-2) * (1 - self.width)

    def ramp(self, levels: Tensor, clock: Tensor, t_min: float) -> tuple[Tensor, Tensor]:
        return 1 - (clock - self._begin(levels)) / self.width, torch.full_like(clock, 1 / self.width)

    def span(self, levels: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
        end = max_steps * (self._begin(levels) + self.width)
        margin = 1 - 2 * torch.finfo(levels.dtype).eps  # an end within rounding of a row is on it, as in step_counts
        return torch.zeros_like(levels), (end * margin - 1e-6).ceil().clamp(1, max_steps)

    def __repr__(self) -> str:
        return f"by_order(order of shape {tuple(self.order.shape)}, width={self.width:g})"


early_stop = EarlyStop()
late_start = LateStart()
full = Full()


def by_order(order: Tensor, width: float) -> ByOrder:
    """The path on which token i matures at turn order[i]: `order` (N,) or (B, N) in [0, 1], `width` in (0, 1].

    Left to right, order = i/(N − 1), it is autoregressive diffusion (Wu et al. 2023); with one turn per block of tokens
    it is block diffusion (Arriola et al. 2025); as `width` → 0 it is autoregression. Raises ValueError or TypeError for
    an order or a width out of range.

    `Path.at` is differentiable in `order`, at a fixed clock value. Of the bound that is the gradient only for tokens that
    fall from level 1 to where they are readable: it does not see the beginning and the end of a token's fall move with
    its turn, and one that begins lower has a slope in its own turn where the bound has none.
    """
    return ByOrder(order=order, width=width)
