"""Writing text: sketch a window token by token, refine it along the flow, commit, go on.

B batch, P prompt tokens, M new tokens, N tokens of one window, K refinement steps, V vocabulary, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from evo.core.cache import Cache
from evo.core.denoiser import Denoised, Denoiser, VectorField
from evo.core.masks import Causal, Window
from evo.core.bound import standard_normal
from evo.heads import Decoder
from evo.schedules import Path, step_counts
from evo.solvers import FixedStep, Solver, integrate

if TYPE_CHECKING:
    from evo.core.model import Evo


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
class Generation:
    """What `Evo.generate` returns.

    Attributes:
        tokens: (B, M) the new tokens only; behind the end of a sequence, the first stop token.
        lengths: (B,) new tokens of each sequence, its stop token included.
        levels: (B, M) the level each token was sketched at; 0 where it was final at once.
        nfe: network evaluations of refinement, each of the whole batch, over all windows.
        trajectory: a `Steps` for every window, if asked for.
    """

    tokens: Tensor
    lengths: Tensor
    levels: Tensor
    nfe: int
    trajectory: tuple[Steps, ...] | None


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


class Prompted:
    """A model that has read something and can go on: the state between two windows.

    `cache` holds BOS (if it is attended) and every token so far, clean; `hidden` (B, 1, W) is the state that speaks of the next token.
    """

    def __init__(self, model: Evo, prompt: Tensor, lengths: Tensor | None, room: int) -> None:
        self.model = model
        self.denoiser = Denoiser.of(model.latent_space, model.schedule)
        size = prompt.shape[1]
        latents = self.denoiser.embeddings[prompt]
        latents, level = model.behind_bos(latents, torch.zeros_like(latents[..., 0]))
        self.cache = Cache(max(1, latents.shape[1] + room))
        self.noise_dtype = torch.promote_types(latents.dtype, torch.float32)
        if not latents.shape[1]:
            self.hidden = model.first_hidden(len(prompt))
            return
        hidden = self._read(latents, level)
        self.hidden = hidden[:, -1:]
        if lengths is not None and bool((lengths != size).any()):
            # What was read of the padding is taken back; nothing before it saw it.
            self.cache.rewind(size - lengths)
            last = model.bos_slots + lengths - 1
            self.hidden = hidden[torch.arange(len(hidden), device=hidden.device), last.clamp(min=0)].unsqueeze(1)
            if not model.bos_slots:
                empty = (lengths == 0)[:, None, None]
                self.hidden = torch.where(empty, model.first_hidden(len(prompt)), self.hidden)

    @property
    def position(self) -> int | Tensor:
        """Where the next token stands in its sequence: int, or (B,) where sequences differ."""
        return self.cache.lengths

    def speak(self) -> Tensor:
        """Context logits (B, V) of the next token."""
        return self.model.readout(self.hidden, self.denoiser.embeddings)[:, 0]

    def read(self, latents: Tensor, level: Tensor) -> None:
        """Append tokens, as latents (B, n, D) at levels (B, n)."""
        self.hidden = self._read(latents, level)[:, -1:]

    def forget(self, count: int | Tensor) -> None:
        """Take back the last `count` tokens, int or (B,); something must be read before the next token is spoken of."""
        self.cache.rewind(count)

    def field(self, length: Tensor | None = None) -> VectorField:
        """The flow of a window behind what has been read. `length` (B,) is how many of its tokens are present; None is all."""
        # Whoever asks stands in the window, so that nothing is prompt to them.
        mask, cache = Window(0, None if length is None else self.position + length), self.cache

        def network(latents: Tensor, level: Tensor, estimate: Tensor | None = None) -> Tensor:
            own = torch.ones(latents.shape[1], dtype=torch.bool, device=latents.device)
            hidden = self.model.backbone(latents, level, mask=mask, own=own, estimate=estimate, cache=cache)
            return self.model.readout(hidden, self.denoiser.embeddings)

        return VectorField(network, self.denoiser, self.model.self_conditioned)

    def _read(self, latents: Tensor, level: Tensor) -> Tensor:
        return self.model.backbone(latents, level, mask=Causal(), cache=self.cache, store=True)


@torch.no_grad()
def generate(model: Evo, prompt: Tensor, lengths: Tensor | None, request: Request) -> Generation:
    """Write `request.max_new_tokens` tokens behind each prompt (B, P), window by window."""
    total, stop = request.max_new_tokens, request.stop
    state = Prompted(model, prompt, lengths, total)
    batch, device = len(prompt), prompt.device
    tokens = torch.zeros(batch, total, dtype=torch.int64, device=device)
    levels = torch.zeros(batch, total, dtype=state.noise_dtype, device=device)
    new_lengths = torch.full((batch,), total, dtype=torch.int64, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    nfe, trajectory = 0, []
    for start in range(0, total, request.window):
        count = min(request.window, total - start)
        before = state.cache.length
        sketch = _sketch(state, count, ended, request)
        # What was read while sketching was noisy; refinement and the next window see what is clean.
        state.forget(state.cache.length - before)
        written, evaluations, steps = refine(state, sketch, request)
        nfe += evaluations
        trajectory.append(steps)
        here = slice(start, start + written.shape[1])
        tokens[:, here], levels[:, here] = written, sketch.levels
        if stop is not None:
            stopped = torch.isin(written, stop)
            ends_here = stopped.any(1) & ~ended
            new_lengths = torch.where(ends_here, start + stopped.to(torch.int8).argmax(1) + 1, new_lengths)
            ended |= ends_here
            if ended.all():
                break
        if start + count < total:
            clean = state.denoiser.embeddings[written]
            state.read(clean, torch.zeros_like(clean[..., 0]))
    behind = torch.arange(total, device=device) >= new_lengths[:, None]
    return Generation(
        tokens=tokens if stop is None else torch.where(behind, stop[0], tokens),
        lengths=new_lengths,
        levels=levels.masked_fill(behind, 0.0),
        nfe=nfe,
        trajectory=tuple(steps for steps in trajectory if steps is not None) if request.trajectory else None,
    )


@dataclass(frozen=True, kw_only=True)
class SketchedWindow:
    """A window before refinement: tokens (B, N), latents (B, N, D), levels (B, N); `length` (B,) tokens present, None for all."""

    tokens: Tensor
    latents: Tensor
    levels: Tensor
    length: Tensor | None


def _sketch(state: Prompted, count: int, ended: Tensor, request: Request) -> SketchedWindow:
    """Draw token after token, each at a level of its own, with the noise that goes with it: the only noise there is."""
    schedule, embeddings = state.denoiser.schedule, state.denoiser.embeddings
    noise = standard_normal((len(ended), count, embeddings.shape[1]), embeddings, request.generator)
    tokens, latents, levels = [], [], []
    length, finished = torch.where(ended, 0, count), ended
    for index in range(count):
        logits = state.speak()
        if index == 0 and not logits.isfinite().all():
            raise ValueError(
                "the network gave NaN or infinite logits while sketching; look for such values in its weights"
            )
        level = request.timestep_head(state.hidden, logits.unsqueeze(1))[:, 0].to(noise.dtype)
        refined = (step_counts(level, request.max_steps) >= 1) & (level > schedule.t_min)
        level = torch.where(refined, level, 0.0)
        token = request.prior(logits, request.generator)
        clean = embeddings[token].to(noise.dtype)
        latent = torch.where(refined[:, None], schedule.noised(clean, noise[:, index], level), clean)
        tokens.append(token)
        latents.append(latent)
        levels.append(level)
        if request.stop is not None:
            # Only a token that is final at once can end a sequence here; the others may yet become something else.
            final = torch.isin(token, request.stop) & ~refined & ~finished
            length, finished = torch.where(final, index + 1, length), finished | final
            if finished.all():
                break
        if index + 1 < count:
            state.read(latent[:, None], level[:, None])
    levels = torch.stack(levels, 1)
    if request.stop is None or bool((length >= len(tokens)).all()):
        length = None
    else:
        length = length.clamp(max=len(tokens))
        levels = levels * (torch.arange(len(tokens), device=levels.device) < length[:, None])
    return SketchedWindow(tokens=torch.stack(tokens, 1), latents=torch.stack(latents, 1), levels=levels, length=length)


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
