"""From a sketched window to words: walk the plan along the flow, and commit every token whose steps are spent.

B batch, N tokens of one window, K refinement steps, V vocabulary, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evo.core.denoiser import Denoised, VectorField
from evo.core.prompted import Prompted
from evo.heads import Decoder
from evo.schedules import Path
from evo.solvers import FixedStep, Solver, integrate


@dataclass(frozen=True, kw_only=True)
class Steps:
    """One window's refinement, row by row of its plan.

    Attributes:
        levels: (B, K+1, N) the plan.
        tokens: (B, K+1, N) what each token would be if it were decoded from the state of that row.
    """

    levels: Tensor
    tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to write: the arguments of `Evo.generate`, checked."""

    max_new_tokens: int
    solver: Solver
    plan: Path
    timestep_head: Callable[[Tensor, Tensor], Tensor]
    prior: Callable[..., Tensor]
    decoder: Decoder
    max_steps: int
    window: int
    stop: Tensor | None
    generator: torch.Generator | None
    trajectory: bool


@dataclass(frozen=True, kw_only=True)
class SketchedWindow:
    """A window before refinement: tokens (B, N), latents (B, N, D), levels (B, N); `length` (B,) tokens present, None for all."""

    tokens: Tensor
    latents: Tensor
    levels: Tensor
    length: Tensor | None


class _Recorder:
    """A field that counts its evaluations and keeps what the first of a row found, from which tokens are committed.

    A self-conditioned network is fed what the first evaluation of the row before found, so that it costs one evaluation too.
    """

    def __init__(self, field: VectorField) -> None:
        self.field, self.nfe, self.first, self.estimate = field, 0, None, None

    def begin_row(self) -> None:
        """Forget what was found, but for the estimate that it is."""
        if self.field.self_conditioned and self.first is not None:
            self.estimate = self.first.latents
        self.first = None

    def denoise(self, latents: Tensor, level: Tensor) -> Denoised:
        self.nfe += 1
        denoised = self.field.denoise(latents, level, self.estimate)
        if self.first is None:
            self.first = denoised
        return denoised

    def __call__(self, latents: Tensor, level: Tensor) -> Tensor:
        return self.field.velocity(self.denoise(latents, level), latents, level)


def refine(state: Prompted, sketch: SketchedWindow, request: Request) -> tuple[Tensor, int, Steps | None]:
    """Walk the plan: tokens (B, N), network evaluations, and the steps if they were asked for.

    A token's last step lands on the denoised latent of the state it starts from, and commits.
    """
    # A plan may be made for windows of full width (`by_order`); a shorter one is its beginning.
    size = sketch.tokens.shape[1]
    levels = F.pad(sketch.levels, (0, request.window - size))
    plan = request.plan(levels, request.max_steps, state.denoiser.schedule.t_min)[..., :size]
    changes = plan[:, 1:] != plan[:, :-1]
    commits = changes & (plan[:, 1:] == 0)
    # One synchronisation a window: which rows do anything, which of them move a token, which commit one.
    busy, moving, committing = torch.stack(
        [rows.any(2).any(0) for rows in (changes, changes & ~commits, commits)]
    ).tolist()
    field = _Recorder(state.field(sketch.length))
    embeddings, solver = state.denoiser.embeddings, request.solver
    tokens, latents, memory = sketch.tokens, sketch.latents, None
    finite, seen = torch.ones((), dtype=torch.bool, device=tokens.device), [tokens]
    for row in range(request.max_steps):
        if busy[row]:
            level, commit = plan[:, row], commits[:, row]
            target = torch.where(commit, level, plan[:, row + 1])
            field.begin_row()
            moved = latents
            if moving[row] and isinstance(solver, FixedStep):
                moved, memory = solver.step(field, latents, level, target, memory)
            elif moving[row]:
                moved = integrate(field, latents, level, target, solver=solver).latents
            found = field.first if field.first is not None else field.denoise(latents, level)
            finite = finite & found.latents.isfinite().all()
            latents = torch.where((changes[:, row] & ~commit).unsqueeze(-1), moved, latents)
            if committing[row]:
                chosen = request.decoder(found.log_probs, found.latents, embeddings, request.generator)
                tokens = torch.where(commit, chosen, tokens)
                latents = torch.where(commit.unsqueeze(-1), embeddings[tokens].to(latents.dtype), latents)
            if request.trajectory:
                seen[-1] = torch.where(level > 0, found.log_probs.argmax(-1), seen[-1])
        if request.trajectory:
            seen.append(tokens)
    if not finite:
        raise ValueError("the network gave NaN or infinite latents while refining; look for such values in its weights")
    steps = Steps(levels=plan, tokens=torch.stack(seen, 1)) if request.trajectory else None
    return tokens, field.nfe, steps
