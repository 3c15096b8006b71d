"""From the arguments of `Evo.generate` to what has to be done."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evo.core.answers import described
from evo.core.contract import Lengths, Stop, as_count, as_levels, as_prompt, as_row_solver, check_called
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
    max_new_tokens: Lengths,
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
    lengths: Lengths | None,
    stop: Stop,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    min_new_tokens: Lengths,
    refresh: int,
    fidelity: float | None,
    trajectory: bool = False,
    stride: int,
    speculation: Speculation | None,
    levels: float | Tensor | None,
    every: int,
) -> Job:
    """What `model` is asked for by the arguments of `Evo.generate` and `Evo.stream`, which has their meaning; raises what they raise."""
    present, ends = as_prompt(model, prompt, lengths, max_new_tokens, min_new_tokens, stop)
    max_steps, stride, every = as_count("max_steps", max_steps), as_count("stride", stride), as_count("every", every)
    window = None if window is None else as_count("window", window)
    if window is not None and stride > window:
        raise ValueError(f"stride is {stride} and the window has {window} tokens; no pass sketches beyond a window")
    sketched = model.timestep_head if timestep_head is None else timestep_head
    check_called("timestep_head", sketched, "timestep_head(hidden, context_logits)", "evo.heads.FixedTimestep(0.5)")
    shape = torch.Size((len(prompt), max(ends.most)))
    given = as_levels(levels, shape, model.bos)
    if given is not None and timestep_head is not None:
        raise ValueError(
            f"levels are given, and so is a timestep_head, {timestep_head!r}, which would choose others: leave one of them out"
        )
    if speculation is not None:
        if not isinstance(speculation, Speculation):
            raise TypeError(f"speculation is {described(speculation)}; it needs Speculation(run=4), or None for none")
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
        if given is not None and bool(given.any()):
            raise ValueError("levels are above 0, and speculation writes at level 0: leave one of them out")
    elif given is None and isinstance(sketched, FixedTimestep):
        given = as_levels(sketched.value, shape, model.bos)
    prior = NucleusPrior(top_p=top_p, temperature=temperature) if prior is None else prior
    check_called("prior", prior, "prior(logits, uniform)", "evo.heads.NucleusPrior()")
    return Job(
        prompt=prompt,
        lengths=present,
        ends=ends,
        draws=Draws.of(generator, len(prompt), prompt.device),
        sampling=Sampling(
            timestep_head=sketched,
            prior=prior,
            max_steps=max_steps,
            stride=stride,
            every=every,
        ),
        levels=None if given is None else given.cpu(),
        speculation=speculation,
        request=Request(
            solver=as_row_solver(Euler() if solver is None else solver, max_steps),
            plan=plan,
            decoder=LinearDecoder() if decoder is None else decoder,
            max_steps=max_steps,
            window=max(ends.most) if window is None else window,
            refresh=refresh,
            fidelity=fidelity,
            trajectory=trajectory,
        ),
    )


def as_options(generate: Callable[..., Any], method: str, given: dict[str, Any], without: set[str]) -> dict[str, Any]:
    """All options of `Evo.generate` but some, those not given as it declares them, for another method that takes them."""
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(generate).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name not in without
    }
    if unknown := sorted(given.keys() - known.keys()):
        raise TypeError(
            f"{method}() takes no {', '.join(unknown)}; its options are those of generate, without {' and '.join(sorted(without))}"
        )
    return known | given
