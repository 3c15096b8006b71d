"""From the arguments of `Evo.generate` to what has to be done.

B batch, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo.core.contract import as_prompt, as_row_solver
from evo.core.draws import Draws
from evo.core.generation import Job
from evo.core.refinement import Request
from evo.core.sketching import Sampling
from evo.core.speculation import Speculation
from evo.heads import Decoder, FixedTimestep, LinearDecoder, NucleusPrior, Prior
from evo.schedules import Path
from evo.solvers import Euler, Solver

if TYPE_CHECKING:
    from evo.core.model import Evo


def as_job(
    model: Evo,
    prompt: Tensor,
    max_new_tokens: int | Sequence[int] | Tensor,
    *,
    solver: Solver | None,
    plan: Path,
    timestep_head: Callable[[Tensor, Tensor], Tensor] | None,
    prior: Prior | None,
    decoder: Decoder | None,
    max_steps: int,
    top_p: float,
    temperature: float,
    window: int | None,
    lengths: Tensor | None,
    stop: int | Sequence[int] | Sequence[Sequence[int]] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    min_new_tokens: int | Sequence[int] | Tensor,
    refresh: int,
    fidelity: float | None,
    trajectory: bool = False,
    stride: int,
    speculation: Speculation | None,
    every: int,
) -> Job:
    """What `model` is asked for by the arguments of `Evo.generate` and `Evo.stream`, which has their meaning; raises what they raise."""
    lengths, ends = as_prompt(model, prompt, lengths, max_new_tokens, min_new_tokens, stop)
    for name, value in (("window", window), ("stride", stride), ("every", every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it needs at least 1 token")
    window = max(ends.most) if window is None else window
    if stride > window:
        raise ValueError(f"stride is {stride} and the window has {window} tokens; no pass sketches beyond a window")
    if speculation is not None:
        if stride > 1:
            raise ValueError(
                f"stride is {stride}, and speculation is asked for: the one sketches tokens in parallel, the other checks each behind "
                "those before it; leave one of them out"
            )
        if timestep_head is not None and not (isinstance(timestep_head, FixedTimestep) and timestep_head.value == 0):
            raise ValueError(
                f"timestep_head is {timestep_head!r}, and speculation writes at level 0: leave one of them out, or make the head "
                "FixedTimestep(0)"
            )
        timestep_head = FixedTimestep(0.0)
    return Job(
        prompt=prompt,
        lengths=lengths,
        ends=ends,
        draws=Draws.of(generator, len(prompt), prompt.device),
        sampling=Sampling(
            timestep_head=model.timestep_head if timestep_head is None else timestep_head,
            prior=NucleusPrior(top_p=top_p, temperature=temperature) if prior is None else prior,
            max_steps=max_steps,
            stride=stride,
            every=every,
        ),
        speculation=speculation,
        request=Request(
            solver=as_row_solver(Euler() if solver is None else solver, max_steps),
            plan=plan,
            decoder=LinearDecoder() if decoder is None else decoder,
            max_steps=max_steps,
            window=window,
            refresh=refresh,
            fidelity=fidelity,
            trajectory=trajectory,
        ),
    )
