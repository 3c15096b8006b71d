"""Rewriting a text: chosen tokens go back to chosen noise levels, and the flow makes words of them again.

B batch, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo.core.bound import Batch
from evo.core.draws import Draws
from evo.core.prompted import Prompted
from evo.core.refinement import Request, SketchedWindow, refine
from evo.schedules import step_counts

if TYPE_CHECKING:
    from evo.core.model import Evo


@dataclass(frozen=True, kw_only=True)
class Edited:
    """What `Evo.edit` returns.

    Attributes:
        tokens: (B, N) the text; where the level is 0, as it was.
        levels: (B, N) the level each token was rewritten from; 0 where it was asked for less than one step, or at most the schedule's
            t_min, and in the prompt and behind the end.
        nfe: network evaluations, each of all sequences in which something moves.
    """

    tokens: Tensor
    levels: Tensor
    nfe: int


@torch.no_grad()
def edit(model: Evo, batch: Batch, levels: Tensor, request: Request, draws: Draws) -> Edited:
    """Rewrite tokens of a batch from levels (B, N), of which the plan is made too; the window is all that follows the prompt.

    Every token has one noise, wherever the prompt ends, and the window begins behind it.
    """
    tokens, device = batch.tokens, batch.tokens.device
    wanted = batch.free & (step_counts(levels, request.max_steps) >= 1) & (levels > model.schedule.t_min)
    levels = torch.where(wanted, levels, 0.0)
    if not wanted.any():
        return Edited(tokens=tokens, levels=levels, nfe=0)
    length = batch.end - batch.prompt
    room = int(length.max())
    state = Prompted(model, tokens[:, : int(batch.prompt.max())], batch.prompt, room)
    embeddings = state.denoiser.embeddings
    noise, uniform = draws.take(tokens.shape[1], embeddings)
    # Column i of the window is token prompt + i of its sequence; what is not there is any token, and nobody sees it.
    place = (batch.prompt[:, None] + torch.arange(room, device=device)).clamp(max=tokens.shape[1] - 1)
    row = torch.arange(len(tokens), device=device)[:, None]
    old, present = tokens[row, place], torch.arange(room, device=device) < length[:, None]
    level = torch.where(present, levels[row, place], 0.0)
    clean = embeddings[old].to(noise.dtype)
    noised = model.schedule.noised(clean, noise[row, place], level)
    sketch = SketchedWindow(
        tokens=old,
        latents=torch.where((level > 0).unsqueeze(-1), noised, clean),
        levels=level,
        uniform=uniform[..., 1][row, place],
        length=length,
        generators=lambda step: draws.numbered(step, range(len(tokens))),
    )

    def in_window(_: Tensor, max_steps: int, t_min: float) -> Tensor:
        """A plan may say of each token of the text when it moves (`by_order`): the columns of it that stand in the window."""
        plan = request.plan(levels, max_steps, t_min)
        return torch.where(present[:, None], torch.take_along_dim(plan, place[:, None], 2), 0.0)

    written, nfe, _ = refine(state, sketch, replace(request, plan=in_window, window=room))
    column = torch.arange(tokens.shape[1], device=device) - batch.prompt[:, None]
    rewritten = written[row, column.clamp(0, room - 1)]
    return Edited(tokens=torch.where(wanted, rewritten, tokens), levels=levels, nfe=nfe)
