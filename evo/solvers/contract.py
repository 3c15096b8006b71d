"""The one place where the arguments of a solve, and what its field and its solver return, are checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .protocols import Callback, Field


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A checked call of `integrate`.

    `start` and `end` are (B, N) in the dtype of `latents` (B, N, D). `live` (B, N) marks the tokens that move; None
    says that all do, and that no time need be spent on masks. `watch` asks the solver to note where a token becomes NaN
    or infinite, at the price of a reduction per step.
    """

    field: Field
    latents: Tensor
    start: Tensor
    end: Tensor
    live: Tensor | None
    callback: Callback | None
    trajectory: bool
    watch: bool

    def level(self, clock: Tensor) -> Tensor:
        """Levels start + clock·(end − start): exactly start at clock 0, end at 1; constant where these are equal."""
        return torch.lerp(self.start, self.end, clock)

    def hold(self, latents: Tensor) -> Tensor:
        """`latents` (B, N, D) where tokens are live; where they are frozen, those of the problem, bit for bit."""
        return latents if self.live is None else torch.where(self.live.unsqueeze(-1), latents, self.latents)

    def lost(self, latents: Tensor) -> Tensor:
        """Which live tokens, (B, N), are NaN or infinite."""
        lost = ~latents.detach().abs().amax(-1).isfinite()
        return lost if self.live is None else lost & self.live


class Velocity:
    """The field as solvers call it: counted, checked, and zero where a token is frozen.

    The zero keeps a frozen token's NaN out of the states inside a step, from where attention would spread it.
    """

    def __init__(self, problem: Problem) -> None:
        self.field = problem.field
        self.live = None if problem.live is None else problem.live.unsqueeze(-1)
        self.nfe = 0

    def __call__(self, latents: Tensor, level: Tensor) -> Tensor:
        """The velocity (B, N, D) at `latents` (B, N, D) and `level` (B, N).

        Raises ValueError for a velocity of another shape, TypeError for one of another type, dtype or device.
        """
        velocity = self.field(latents, level)
        self.nfe += 1
        check_like("field", "velocities", velocity, latents)
        return velocity if self.live is None else torch.where(self.live, velocity, 0.0)


def check_like(who: str, what: str, found: object, latents: Tensor) -> None:
    """Raise unless `who` returned `what`, one for each of `latents` (B, N, D).

    ValueError for another shape, TypeError for another type, dtype or device. No value is looked at.
    """
    if not isinstance(found, Tensor):
        raise TypeError(f"{who} must return a tensor of {what}, got {type(found).__name__}")
    if found.shape != latents.shape:
        raise ValueError(f"{who} must return {what} of shape {tuple(latents.shape)}, got shape {tuple(found.shape)}")
    if found.dtype != latents.dtype or found.device != latents.device:
        raise TypeError(
            f"{who} must return {latents.dtype} on {latents.device}, like its latents, got {found.dtype} on "
            f"{found.device}: compute as you wish inside it, and convert the {what} back"
        )


def check(
    field: Field,
    latents: Tensor,
    start: float | Tensor,
    end: float | Tensor,
    *,
    callback: Callback | None,
    trajectory: bool,
    watch: bool,
) -> Problem:
    """The problem that `integrate` was given. Raises TypeError or ValueError, naming what came and what is needed."""
    if not callable(field):
        raise TypeError(f"field must be a callable (latents, level) -> velocity, got {type(field).__name__}")
    if not isinstance(latents, Tensor) or latents.dtype not in (torch.float32, torch.float64):
        given = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise TypeError(
            f"latents must be a float32 or float64 tensor, got {given}: in a narrower state small steps are lost. "
            "Convert it with .float(), and cast inside the field"
        )
    if latents.dim() != 3 or not latents.numel():
        raise ValueError(f"latents must be (batch, tokens, dim), none of them 0, got shape {tuple(latents.shape)}")
    starts, ends = _levels("start", start, latents), _levels("end", end, latents)
    has_tensor = isinstance(start, Tensor) or isinstance(end, Tensor)
    live = _live(starts, ends) if has_tensor or start == end else None
    return Problem(
        field=field,
        latents=latents,
        start=starts,
        end=ends,
        live=live,
        callback=callback,
        trajectory=trajectory,
        watch=watch,
    )


def _levels(name: str, level: float | Tensor, latents: Tensor) -> Tensor:
    """`level` as a tensor (B, N) like `latents`. The values of a tensor are left to `_live`."""
    batch, tokens, _ = latents.shape
    if not isinstance(level, Tensor):
        if not 0 <= level <= 1:
            raise ValueError(f"{name} must be a level in [0, 1], got {level}")
        return latents.new_full((batch, tokens), level)
    if not level.is_floating_point():
        raise TypeError(f"{name} must hold floating-point levels, got {level.dtype}")
    if level.device != latents.device:
        raise ValueError(f"{name} must be on the device of the latents, {latents.device}, got {level.device}")
    if level.shape not in ((), (batch,), (batch, tokens)):
        raise ValueError(
            f"{name} must be a number, ({batch},) for a level per sequence or ({batch}, {tokens}) for one per token, "
            f"got shape {tuple(level.shape)}"
        )
    level = level.unsqueeze(-1) if level.dim() == 1 else level
    return level.to(latents.dtype).expand(batch, tokens).contiguous()


def _live(start: Tensor, end: Tensor) -> Tensor | None:
    """Which tokens (B, N) move, None for all. One synchronisation; none in compiled code, which looks at no values."""
    moves = start != end
    if torch.compiler.is_compiling():
        return moves
    levels = torch.stack((start, end))
    low, high, all_move = torch.stack((*levels.aminmax(), moves.all())).tolist()
    if not (low >= 0 and high <= 1):
        first = tuple((~((levels >= 0) & (levels <= 1))).any(0).nonzero()[0].tolist())
        span = f"from {start[first].item()} to {end[first].item()}"
        raise ValueError(f"levels must lie in [0, 1], got a span {span} for token (sequence, position) {first}")
    return None if all_move else moves
