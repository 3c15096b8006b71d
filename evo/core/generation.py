"""Writing text: sketch a window token by token, refine it along the flow, commit, go on.

B batch, M new tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo.core.draws import Draws
from evo.core.ends import Ends
from evo.core.evaluation import evaluating
from evo.core.refinement import Plan, Request, SketchedWindow, Steps, refine
from evo.core.sketching import Run, Sampling, WindowSketch
from evo.core.speculation import Speculation, speculate
from evo.core.suffix import Suffix, between

if TYPE_CHECKING:
    from evo.core.model import Evo


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `Evo.generate` returns.

    Attributes:
        tokens: (B, M) the new tokens only; behind the end of a sequence, its first stop token (0 if it has none).
        lengths: (B,) new tokens of each sequence, its stop token included.
        levels: (B, M) the level each token was sketched at; 0 where it was final at once.
        nfe: network evaluations of refinement, each of all sequences that are refined together, over all windows.
        accepted: of each sequence, how many proposals became text in each round of speculation; None where nothing was proposed.
        trajectory: a `Steps` for every window, if asked for; where levels are known to be 0 and windows of whole strides, all is one.
    """

    tokens: Tensor
    lengths: Tensor
    levels: Tensor
    nfe: int
    accepted: tuple[tuple[int, ...], ...] | None
    trajectory: tuple[Steps, ...] | None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """New tokens of one sequence, as `Evo.stream` hands them out: final, and in order.

    Attributes:
        row: the sequence, by its row in the prompt.
        position: of the first of these tokens among the new tokens of its sequence.
        tokens: ids, at least one.
        levels: the level each was sketched at; 0 where it was final at once.
        last: whether the sequence ends with them.
        nfe: network evaluations of refinement so far, as in `Generation`.
    """

    row: int
    position: int
    tokens: tuple[int, ...]
    levels: tuple[float, ...]
    last: bool
    nfe: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to write and how: the arguments of `Evo.generate`, checked.

    Attributes:
        prompt: ids (B, P).
        lengths: (B,) tokens present in each prompt; None is all of P.
        ends: where the sequences end.
        draws: their randomness.
        sampling: how to sketch.
        levels: (B, M) on the host, where it is known beforehand what they will be; None is to ask the head.
        speculation: how to guess what will be written at level 0; None is not to guess.
        request: how to refine.
        suffix: what stands on the right of the text to be written; None is nothing.
    """

    prompt: Tensor
    lengths: Tensor | None
    ends: Ends
    draws: Draws
    sampling: Sampling
    levels: Tensor | None
    speculation: Speculation | None
    request: Request
    suffix: Suffix | None = None


@dataclass(kw_only=True)
class Report:
    """What a writer has to say besides the text: evaluations of refinement, accepted proposals of each sequence round by round, and of
    each window its size, its rows and their steps.
    """

    nfe: int = 0
    accepted: list[list[int]] | None = None
    windows: list[tuple[int, list[int], Steps | None]] = field(default_factory=list)


def generate(model: Evo, job: Job) -> Generation:
    """Write behind each prompt until every sequence has ended."""
    report, ends, batch = Report(), job.ends, len(job.prompt)
    tokens: list[list[int]] = [[] for _ in range(batch)]
    levels: list[list[float]] = [[] for _ in range(batch)]
    for chunk in write(model, job, report):
        tokens[chunk.row] += chunk.tokens
        levels[chunk.row] += chunk.levels
    lengths, total = [len(each) for each in tokens], max(ends.most)
    for row, length in enumerate(lengths):
        tokens[row] += (ends.stop[row] or (0,))[:1] * (total - length)
        levels[row] += [0.0] * (total - length)
    device, dtype = job.prompt.device, torch.promote_types(model.bos.dtype, torch.float32)
    written = torch.tensor(tokens, device=device)
    return Generation(
        tokens=written,
        lengths=torch.tensor(lengths, device=device),
        levels=torch.tensor(levels, dtype=dtype, device=device),
        nfe=report.nfe,
        accepted=None if report.accepted is None else tuple(map(tuple, report.accepted)),
        trajectory=_trajectory(written, report, job.request.max_steps, dtype) if job.request.trajectory else None,
    )


def stream(model: Evo, job: Job) -> Generator[Chunk, None, None]:
    """What `generate` writes, as it becomes final. Between two chunks the model is in the mode that it was in."""
    with contextlib.closing(write(model, job, Report())) as chunks:
        while True:
            with evaluating(model) if model.training else contextlib.nullcontext():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


@torch.no_grad()
def write(model: Evo, job: Job, report: Report) -> Generator[Chunk, None, None]:
    """Write, handing out what is final. Everything held is let go of when the iterator is closed."""
    ends, draws, request = job.ends, job.draws, job.request
    state = between(model, job.prompt, job.lengths, job.suffix, max(ends.most))
    if job.speculation is not None:
        report.accepted = [[] for _ in job.prompt]
        report.windows.append((max(ends.most), [], None))
        for run in speculate(state, draws, ends, job.sampling.prior, job.speculation, report.accepted):
            yield _chunk(run, run.row, 0, report)
        return
    rows, start, size = list(range(len(job.prompt))), 0, request.window
    levels, stride = job.levels, job.sampling.stride
    ahead = draws.apart() if stride > 1 else None
    still = levels is not None and not job.sampling.refined(levels, state.denoiser.schedule.t_min).any()
    if still and size % stride == 0:
        # Nothing will ever be refined together: a border between windows, which parts no run, would cost its time and change nothing.
        size = max(ends.most)
    while rows:
        count = min(size, max(ends.most) - start)
        noise, uniform = draws.take(count, state.denoiser.embeddings)
        waiting = None if ahead is None else ahead.take(count, state.denoiser.embeddings)[0]
        given = None if levels is None else levels[rows, start : start + count]
        window = WindowSketch(state, noise, uniform[..., 0], waiting, given, ends, start, job.sampling)
        for run in window.run():
            yield _chunk(run, rows[run.row], start, report)
        state = window.state
        if any(window.noisy):
            yield from _refined(window, uniform[..., 1], draws, rows, len(job.prompt), request, report)
        else:
            report.windows.append((window.size, [], None))
        staying = [row for row in range(len(rows)) if not window.ended[row]]
        start += count
        if staying:
            index = torch.tensor(staying, device=noise.device)
            if staying != window.standing:
                state.select(torch.tensor([window.standing.index(row) for row in staying], device=noise.device))
            clean = state.denoiser.embeddings[window.tokens[index, window.read :]]
            state.read(clean, torch.zeros_like(clean[..., 0]))
            if len(staying) < len(rows):
                draws.select(staying)
                if ahead is not None:
                    ahead.select(staying)
                ends = ends.take(staying)
        rows = [rows[row] for row in staying]


def _chunk(run: Run, row: int, start: int, report: Report) -> Chunk:
    """What has become final of a window that begins at `start`."""
    return Chunk(
        row=row,
        position=start + run.place,
        tokens=tuple(run.tokens),
        levels=tuple(run.levels),
        last=run.last,
        nfe=report.nfe,
    )


def _refined(
    window: WindowSketch,
    uniform: Tensor,
    draws: Draws,
    rows: list[int],
    batch: int,
    request: Request,
    report: Report,
) -> Iterator[Chunk]:
    """Refine what is left of a window, in place, and hand it out."""
    state, size = window.state, window.size
    # What was read while sketching was noisy; refinement and the next window see what is clean.
    state.forget(window.read)
    window.read = 0
    standing = window.standing
    index = torch.tensor(standing, device=uniform.device)
    length = torch.tensor([min(window.length[row], size) for row in standing], device=uniform.device)
    present = torch.arange(size, device=uniform.device) < length[:, None]
    sketch = SketchedWindow(
        tokens=window.tokens[index, :size],
        latents=window.latents[index, :size],
        levels=window.levels[index, :size] * present,
        uniform=uniform[index, :size],
        length=None if all(window.length[row] >= size for row in standing) else length,
        banned=None if window.banned is None else window.banned.take(index),
        generators=lambda step: draws.numbered(window.start * request.max_steps + step, standing),
    )
    whole = [rows[row] for row in standing]
    if len(whole) < batch:
        request = replace(request, plan=partial(_plan_of_rows, request.plan, whole, batch))
    written, evaluations, steps = refine(state, sketch, request)
    report.nfe += evaluations
    report.windows.append((size, whole, steps))
    window.tokens[index, :size] = written
    for row, tokens, levels in zip(standing, written.tolist(), sketch.levels.tolist(), strict=True):
        end = window.ends.end(row, window.start, tokens[: window.length[row]])
        window.ended[row] = end is not None
        shown, stop = window.shown[row], window.length[row] if end is None else end
        if shown < stop:
            yield Chunk(
                row=rows[row],
                position=window.start + shown,
                tokens=tuple(tokens[shown:stop]),
                levels=tuple(levels[shown:stop]),
                last=window.ended[row],
                nfe=report.nfe,
            )


def _plan_of_rows(plan: Plan, rows: list[int], batch: int, levels: Tensor, max_steps: int, t_min: float) -> Tensor:
    """The plan of some sequences of a batch, by a rule that may say something else of each."""
    whole = levels.new_zeros(batch, levels.shape[1])
    whole[rows] = levels
    return plan(whole, max_steps, t_min)[rows]


def _trajectory(written: Tensor, report: Report, max_steps: int, dtype: torch.dtype) -> tuple[Steps, ...]:
    """Steps of every window for the whole batch; a sequence that was not refined stands at its tokens all the while."""
    found, start = [], 0
    for size, rows, steps in report.windows:
        tokens = written[:, None, start : start + size].repeat(1, max_steps + 1, 1)
        levels = torch.zeros(tokens.shape, dtype=dtype, device=tokens.device)
        if steps is not None:
            tokens[rows], levels[rows] = steps.tokens, steps.levels
        found.append(Steps(levels=levels, tokens=tokens))
        start += size
    return tuple(found)
