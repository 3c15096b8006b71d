"""One step of the optimizer: this rank's share of the batch in passes, gradients and figures summed over passes and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from evo.core import Objective, Output, Part
from evo.core.part import to_device
from evo.data import Packed
from evo.training.config import TrainConfig
from evo.training.curriculum import PATHS, windows
from evo.training.optimizer import step_if
from evo.training.parallel import accumulating, clip_gradients, data_ranks, data_sum
from evo.training.precision import autocast
from evo.training.seeds import Purpose, derive, generator, generators
from evo.training.state import TrainState

LEVEL_BINS = 10

# Sums over the tokens of a step; nats where they are information. What is free is neither context nor absent.
_SUMS = ("loss", "bound", "sketch", "flow", "reconstruction", "scored", "free", "level", "bytes")
_WIDTH = len(_SUMS) + LEVEL_BINS


@dataclass(frozen=True, kw_only=True)
class Share:
    """What this rank does of every step.

    Attributes:
        rows: its rows of the whole batch.
        size: rows of one pass.
        total: rows of the whole batch.
        mesh: of all ranks; None for one process.
    """

    rows: range
    size: int
    total: int
    mesh: DeviceMesh | None

    @classmethod
    def of(cls, config: TrainConfig, mesh: DeviceMesh | None) -> Share:
        """That of this rank. Raises `ValueError` where sequences do not come out even."""
        index, count = data_ranks(mesh)
        share, size = config.shares(count)
        return cls(rows=range(index * share, (index + 1) * share), size=size, total=config.batch_size, mesh=mesh)

    def passes(self) -> Iterator[tuple[range, slice]]:
        """For each pass its rows in the whole batch, and where they are among this rank's."""
        for begin in range(0, len(self.rows), self.size):
            here = slice(begin, begin + self.size)
            yield self.rows[here], here


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a step came to, on the device and the same on every rank.

    Attributes:
        finite: 0-dim bool, whether it counted: loss and gradient were finite.
        figures: (F,) float64 sums over the whole batch, for `report`.
        unsound: bool (total,), the sequences whose own bound was not finite.
        told: 0-dim, how many ranks have been told to end.
    """

    finite: Tensor
    figures: Tensor
    unsound: Tensor
    told: Tensor


def train_step(
    config: TrainConfig,
    state: TrainState,
    share: Share,
    batch: Packed,
    asked: Objective,
    *,
    rate: float,
    text_bytes: Callable[[Tensor], float],
    told: bool = False,
    at: Callable[[str], None] = lambda place: None,
) -> Done:
    """One step of the optimizer on this rank's rows of the batch; nothing here waits for the device.

    Losses and gradients are those of the whole batch: sums over its sequences, divided by how many tokens all of it scores.

    Args:
        config: of the run.
        state: before the step; afterwards that behind it.
        share: which rows, and in how many passes.
        batch: these rows, on the host.
        asked: the objective of this step.
        rate: learning rate of this step.
        text_bytes: length of tokens as text.
        told: whether this rank has been told to end.
        at: is told what comes next.
    """
    step, device, mesh = state.step, state.skipped.device, share.mesh
    at(f"passes of step {step}")
    sums, unsound, observed = _passes(config, state, share, batch, asked, text_bytes)
    at(f"sums over ranks of step {step}")
    learned = torch.stack(observed).sum(0) if observed else sums.new_zeros(0)
    found = torch.cat([sums, unsound, learned, sums.new_full((1,), float(told))])
    _sum_over_ranks(found, mesh)
    sums, unsound, learned, told_to_end = found.split([_WIDTH, share.total, len(learned), 1])
    asked.observe(learned if observed else None)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    norm = to_device(clip_gradients(state.model, config.optimizer.clip), device)
    finite = sums[0].isfinite() & norm.isfinite()
    step_if(state.optimizer, finite)
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.model, step)
    state.skipped += ~finite
    state.rejected = torch.where(finite, 0, state.rejected + 1)
    state.step += 1
    figures = torch.cat([sums, norm.double().reshape(1)])
    return Done(finite=finite, figures=figures, unsound=unsound > 0, told=told_to_end[0])


def _passes(
    config: TrainConfig,
    state: TrainState,
    share: Share,
    batch: Packed,
    asked: Objective,
    text_bytes: Callable[[Tensor], float],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All passes of this rank, forward and back: the sums of their figures, which sequences were unsound, and what each observed."""
    step, device, mesh = state.step, state.skipped.device, share.mesh
    prompts, ends, stops = _windows(config, step, share, batch)
    counts = (torch.arange(config.length) < stops[:, None]) & batch.loss_mask
    scored = data_sum(to_device(counts.sum(), device), mesh)
    # Ranks that share rows drop the same; for the others dropout, alone of all that is random, is not that of one process.
    torch.manual_seed(derive(config.seed, Purpose.DROPOUT, step, data_ranks(mesh)[0]))
    sums, unsound = (torch.zeros(count, dtype=torch.float64, device=device) for count in (_WIDTH, share.total))
    sums[_SUMS.index("bytes")] = text_bytes(batch.tokens[counts])
    observed: list[Tensor] = []
    for rows, here in share.passes():
        packed = batch.rows(here).to(device)
        prompt, end, stop = (to_device(each[here], device) for each in (prompts, ends, stops))
        with accumulating(state.model, last=rows.stop == share.rows.stop):
            with autocast(device, config.precision):
                out = state.model(
                    packed.tokens,
                    packed.loss_mask,
                    documents=packed.documents,
                    prompt_length=prompt,
                    lengths=end,
                    suffix_length=end - stop if config.curriculum.suffix else None,
                    path=PATHS[config.curriculum.path],
                    generator=generators(device, config.seed, Purpose.LEVELS, step, rows),
                    objective=asked,
                    part=Part(
                        rows=rows,
                        total=share.total,
                        scored=scored,
                        common=generator(device, config.seed, Purpose.COMMON, step),
                    ),
                )
            out.loss.backward()
        places = torch.arange(config.length, device=device)
        coded = places < stop[:, None]
        sums += _sums(out, coded & packed.loss_mask, coded & (places >= prompt[:, None]))
        unsound[rows.start : rows.stop] = (~out.bound.detach().isfinite().all(1)).double()
        if out.observed is not None:
            observed.append(out.observed)
    return sums, unsound, observed


def report(sums: Sequence[float], counted: int) -> dict[str, Any]:
    """Figures over `counted` steps from their sums: in bits but for the loss (nats), and NaN where there were no steps.

    Levels are those of tokens that are neither prompt nor suffix; `level_histogram` has their shares in tenths. From one value of the
    clock a sequence and a capped weight, these show how training goes and are no bound.
    """
    found = dict(zip(_SUMS, sums, strict=False)) if counted else dict.fromkeys(_SUMS, math.nan)
    bits = 1 / (math.log(2) * max(1.0, found["scored"]))
    free = max(1.0, found["free"])
    histogram = [count / free for count in sums[len(_SUMS) : _WIDTH]]
    return {
        "loss": found["loss"] / max(1, counted),
        "bits_per_token": found["bound"] * bits,
        **{name: found[name] * bits for name in ("sketch", "flow", "reconstruction")},
        "bits_per_byte": found["bound"] / (math.log(2) * max(1.0, found["bytes"])),
        "mean_level": found["level"] / free,
        "level_histogram": histogram if counted else [math.nan] * LEVEL_BINS,
        "gradient_norm": sums[-1] / counted if counted else math.nan,
    }


def _windows(config: TrainConfig, step: int, share: Share, batch: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's rows: where prompts end, where sequences end, and where what is scored does, each (rows,) int64."""
    shares = config.curriculum.window, config.curriculum.suffix
    drawn = windows(*shares, config.seed, step, share.total, config.length)
    prompts, ends, suffixes = (each[share.rows.start : share.rows.stop] for each in drawn)
    # Padding belongs to none of the three.
    ends = torch.minimum(ends, batch.lengths)
    prompts = torch.minimum(prompts, ends)
    return prompts, ends, ends - torch.minimum(suffixes, ends - prompts)


def _sums(out: Output, scored: Tensor, free: Tensor) -> Tensor:
    """The figures of a pass: those of `_SUMS`, without bytes, and how many free levels there are in each tenth."""
    bits = torch.stack([each.detach() for each in (out.bound, out.sketch_bits, out.flow_bits, out.reconstruction)])
    bits = torch.where(scored, bits, 0.0)
    levels = torch.where(free, out.levels.detach(), 0.0)
    tenths = (levels * LEVEL_BINS).long().clamp(max=LEVEL_BINS - 1)
    histogram = torch.zeros(LEVEL_BINS, dtype=torch.float64, device=free.device)
    histogram.index_add_(0, tenths.flatten(), free.flatten().double())
    return torch.cat(
        [
            out.loss.detach().double().reshape(1),
            bits.sum((1, 2), dtype=torch.float64),
            torch.stack([scored.sum(), free.sum()]).double(),
            levels.sum(dtype=torch.float64).reshape(1),
            histogram.new_zeros(1),
            histogram,
        ]
    )


def _sum_over_ranks(values: Tensor, mesh: DeviceMesh | None) -> None:
    """Add up, in place, what the ranks have found: of ranks that share rows the first says it, but for the last value, which is each one's.

    One reduction over all of them, so that all see the same.
    """
    if mesh is None:
        return
    if any(mesh[name].get_local_rank() for name in ("pipeline", "context", "tensor")):
        values[:-1] = 0
    dist.all_reduce(values)
