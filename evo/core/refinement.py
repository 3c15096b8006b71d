"""From a sketched window to words: walk the plan along the flow, and commit every token whose steps are spent.

B batch, N tokens of one window, K refinement steps, R tokens read in one row of the plan, D latent dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from evo.core.agenda import Agenda, Work
from evo.core.answers import decoded_by, described, logits_of
from evo.core.contract import as_count, check_called
from evo.core.denoiser import Denoised
from evo.core.ends import Banned
from evo.core.prompted import Prompted
from evo.heads import Decoder
from evo.schedules import check_rows
from evo.solvers import FixedStep, Solver, integrate

Plan = Callable[[Tensor, int, float], Tensor]
"""A rule for plans: levels (B, N), K and t_min to levels (B, K+1, N)."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """One window's refinement, row by row of its plan.

    Attributes:
        levels: (B, K+1, N) the plan; what was committed early is 0 from there on.
        tokens: (B, K+1, N) what each token would be if it were decoded from the state of that row. A token that waits is not looked at,
            and stays what it was.
    """

    levels: Tensor
    tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to refine: those arguments of `Evo.generate` that say so, checked."""

    solver: Solver
    plan: Plan
    decoder: Decoder
    max_steps: int
    window: int
    trajectory: bool = False
    refresh: int = 1
    fidelity: float | None = None

    def __post_init__(self) -> None:
        check_called("plan", self.plan, "plan(levels, max_steps, t_min)", "evo.schedules.early_stop")
        check_called(
            "decoder", self.decoder, "decoder(logits, denoised, embeddings, uniform)", "evo.heads.LinearDecoder()"
        )
        as_count("refresh", self.refresh)
        if self.fidelity is None:
            return
        needed = f"fidelity is {described(self.fidelity)}; it is the probability from which a token is final, in (0, 1], or None for never"
        if isinstance(self.fidelity, bool) or not isinstance(self.fidelity, Real):
            raise TypeError(needed)
        if not 0 < self.fidelity <= 1:
            raise ValueError(needed)


@dataclass(frozen=True, kw_only=True)
class SketchedWindow:
    """A window before refinement.

    Attributes:
        tokens: (B, N).
        latents: (B, N, D).
        levels: (B, N).
        uniform: (B, N) in [0, 1), of a decoder that draws.
        length: (B,) tokens present, None for all.
        banned: what may not be written; None for nothing.
        generators: of a row of the plan, one for each sequence, for a solver that draws; None is for it to bring its own.
    """

    tokens: Tensor
    latents: Tensor
    levels: Tensor
    uniform: Tensor
    length: Tensor | None
    banned: Banned | None = None
    generators: Callable[[int], Sequence[torch.Generator]] | None = None


class _LiveField:
    """The flow of a window, computed where a row of its plan asks for it: 0 for every token that it does not read.

    Counts its evaluations, and keeps what the first of a row found, from which tokens are committed. A self-conditioned network is fed
    what the first evaluation of the row before found, so that it costs one evaluation too.
    """

    def __init__(self, state: Prompted, sketch: SketchedWindow) -> None:
        self.state, self.field, self.banned = state, state.field(), sketch.banned
        self.estimate = torch.zeros_like(sketch.latents) if self.field.self_conditioned else None
        self.nfe, self.work = 0, None
        self._first: tuple[Tensor, Tensor, Denoised] | None = None

    def begin(self, work: Work) -> None:
        """Turn to another row."""
        if self.estimate is not None and self._first is not None and self.work is not None:
            self.estimate = _put(self.estimate, self.work.read, self._first[2].latents[0])
        self._first, self.work = None, work

    def found(self, latents: Tensor, level: Tensor) -> Denoised:
        """What the first evaluation of the row found of the tokens it reads, (1, R, ·); it is made now if it has not been."""
        return self._denoise(latents, level) if self._first is None else self._first[2]

    def __call__(self, latents: Tensor, level: Tensor) -> Tensor:
        assert self.work is not None
        first, read = self._first, self.work.read
        # A row whose tokens are looked at before they move is not evaluated twice where it begins.
        again = first is not None and first[0] is latents and first[1] is level
        denoised = first[2] if first is not None and again else self._denoise(latents, level)
        velocity = self.field.velocity(denoised, _take(latents, read), _take(level, read))
        return _put(torch.zeros_like(latents), read, velocity[0])

    def _denoise(self, latents: Tensor, level: Tensor) -> Denoised:
        assert self.work is not None
        work, denoiser = self.work, self.field.denoiser
        self.nfe += 1
        hidden = self.state.model.hidden_states(
            _take(latents, work.computed),
            _take(level, work.computed),
            own=torch.ones(1, dtype=torch.bool, device=level.device),
            estimate=None if self.estimate is None else _take(self.estimate, work.computed),
            cache=self.state.cache,
            packing=work.packing,
        )
        if work.picked is not None:
            hidden = hidden.index_select(1, work.picked)
        logits = logits_of(self.state.model.readout, hidden, denoiser.embeddings)
        if self.banned is not None:
            size = level.shape[1]
            logits = self.banned(logits[0], work.read // size, work.read % size).unsqueeze(0)
        denoised = denoiser(logits, _take(latents, work.read), _take(level, work.read))
        if self._first is None:
            self._first = latents, level, denoised
        return denoised


def refine(state: Prompted, sketch: SketchedWindow, request: Request) -> tuple[Tensor, int, Steps | None]:
    """Walk the plan: tokens (B, N), network evaluations, and the steps if they were asked for.

    A token's last step lands on the denoised latent of the state it starts from, and commits. Each sequence is refined as if it were
    alone; only a solver that chooses its own steps chooses them for all.

    Raises:
        ValueError, TypeError: if the network gives NaN or infinity, for a plan that is none, or for a decoder that gives no ids.
    """
    # A plan may be made for windows of full width (`by_order`); a shorter one is its beginning.
    size = sketch.tokens.shape[1]
    levels = F.pad(sketch.levels, (0, request.window - size))
    plan = request.plan(levels, request.max_steps, state.denoiser.schedule.t_min)
    check_rows(plan, levels, request.max_steps)
    plan = plan[..., :size]
    if request.fidelity is not None:
        plan = plan.clone()
    field = _LiveField(state, sketch)
    agenda = Agenda(
        plan,
        list(state.cache.ends(0) or [state.cache.length] * len(plan)),
        [size] * len(plan) if sketch.length is None else sketch.length.tolist(),
        refresh=request.refresh,
        waiting=field.field.self_conditioned,
    )
    embeddings, solver = state.denoiser.embeddings, request.solver
    tokens, latents, memory = sketch.tokens, sketch.latents, None
    finite, seen = torch.ones((), dtype=torch.bool, device=tokens.device), [tokens]
    for row in range(request.max_steps):
        # What rests while nothing else moves begins anew, as it does where others move meanwhile.
        before, memory = memory, None
        if (work := agenda.begin(row)) is not None:
            level, after = plan[:, row], plan[:, row + 1]
            moving, any_moving = (after != level) & (after > 0), work.moving
            field.begin(work)
            if request.fidelity is not None:
                settled = field.found(latents, level).log_probs[0].amax(-1) >= math.log(request.fidelity)
                any_moving = agenda.settle(settled.cpu())
                early = _put(torch.zeros_like(moving), work.read, settled) & moving
                moving = moving & ~early
                plan[:, row + 1 :].masked_fill_(early.unsqueeze(1), 0.0)
            moved, target = latents, torch.where(moving, after, level)
            if any_moving and isinstance(solver, FixedStep):
                step = solver if sketch.generators is None else solver.drawing(partial(sketch.generators, row))
                moved, memory = step.advance(field, latents, level, target, before)
            elif any_moving:
                moved = integrate(field, latents, level, target, solver=solver).latents
            found = field.found(latents, level)
            finite = finite & found.latents.isfinite().all()
            latents = torch.where(moving.unsqueeze(-1), moved, latents)
            if request.trajectory:
                seen[-1] = _put(seen[-1], work.read, found.log_probs[0].argmax(-1))
            if (commit := agenda.commit()) is not None:
                among, places = commit
                log_probs, uniform = found.log_probs[0, among], _take(sketch.uniform, places)[0]
                chosen = decoded_by(request.decoder, log_probs, found.latents[0, among], embeddings, uniform)
                tokens = _put(tokens, places, chosen)
                latents = _put(latents, places, embeddings[chosen].to(latents.dtype))
        if request.trajectory:
            seen.append(tokens)
    if not finite:
        raise ValueError("the network gave NaN or infinite latents while refining; look for such values in its weights")
    steps = Steps(levels=plan, tokens=torch.stack(seen, 1)) if request.trajectory else None
    return tokens, field.nfe, steps


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Of (B, N, ...), what stands at these places (T,) of the window laid flat: (1, T, ...)."""
    return x.flatten(0, 1).index_select(0, places).unsqueeze(0)


def _put(x: Tensor, places: Tensor, new: Tensor) -> Tensor:
    """A copy of (B, N, ...) with new values (T, ...) at these places (T,) of the window laid flat."""
    return x.flatten(0, 1).index_copy(0, places, new).view_as(x)
