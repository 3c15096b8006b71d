"""Writing text: sketch a window token by token, refine it along the flow, commit, go on.

B batch, P prompt tokens, M new tokens, N tokens of one window, V vocabulary, D latent dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo.core.bound import standard_normal
from evo.core.prompted import Prompted
from evo.core.refinement import Request, SketchedWindow, Steps, refine
from evo.schedules import step_counts

if TYPE_CHECKING:
    from evo.core.model import Evo


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
