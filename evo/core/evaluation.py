"""The bound as a figure: enough clock values, the network's own reconstruction, and a standard error beside it.

B batch, N tokens, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from evo.core.contract import as_batch, as_levels
from evo.core.objective import Batch, Output, Sketch, learned_levels, standard_normal
from evo.schedules import Path, early_stop

if TYPE_CHECKING:
    from evo.core.model import Evo


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A reported bound, in nats per token.

    Attributes:
        nats: the bound.
        standard_error: of `nats`, over sequences (levels, noise and clock values are drawn anew for each).
        sketch, flow, reconstruction: the parts of `nats`.
        mean_level: of the tokens scored.
        tokens: how many were scored.
        path: the path that levels fell along; a bound of a trained network depends on it.
    """

    nats: float
    standard_error: float
    sketch: float
    flow: float
    reconstruction: float
    mean_level: float
    tokens: int
    path: Path

    @property
    def perplexity(self) -> float:
        """Exp of the bound per token."""
        return math.exp(self.nats)

    def bits_per(self, units: int) -> dict[str, float | str]:
        """Everything in bits per unit (of bytes, of words) where the text scored has so many, as JSON values."""
        factor = self.tokens / math.log(2) / units
        return {
            "bits": self.nats * factor,
            "standard_error": self.standard_error * factor,
            "sketch": self.sketch * factor,
            "flow": self.flow * factor,
            "reconstruction": self.reconstruction * factor,
            "mean_level": self.mean_level,
            "path": str(self.path),
        }


def measure(
    model: Evo,
    batch: Batch,
    scored: Tensor,
    levels: Tensor | None,
    path: Path,
    generator: torch.Generator | None,
    clock_values: int,
    snap: float = 0.0,
) -> Output:
    """The bound of each token at given levels (B, N), or at the head's own (None), from `clock_values` values of the clock a sequence.

    Each sequence has its clock values stratified over [0, 1] behind an offset of its own. Levels below `snap` become 0.
    """
    noise = standard_normal((*batch.tokens.shape, model.latent_space.dim), model.latent_space.directions, generator)
    if levels is None:
        levels = learned_levels(model, batch, noise, snap)
    levels = torch.where(levels < snap, 0.0, levels)
    sketch = Sketch(model, batch, levels, noise)
    bits, _ = sketch.bits()
    flow = reconstruction = torch.zeros_like(bits)
    # Nothing is left to refine at level 0: one pass instead of several, and zeros that are exact.
    if sketch.live.any():
        offset = torch.rand(len(noise), generator=generator, device=noise.device, dtype=noise.dtype)
        for index in range(clock_values):
            flow = flow + sketch.flow_bits(path, (offset + index) / clock_values, generator)[0] / clock_values
        reconstruction = sketch.reconstruction(generator, network=True)
    bound = bits + flow + reconstruction
    return Output(
        loss=(bound * scored).sum() / scored.sum().clamp(min=1),
        sketch_bits=bits,
        flow_bits=flow,
        reconstruction=reconstruction,
        levels=sketch.levels,
    )


@torch.no_grad()
def evaluate(
    model: Evo,
    tokens: Tensor | Iterable[Tensor],
    levels: float | Tensor | None = None,
    *,
    path: Path = early_stop,
    clock_values: int = 8,
    snap: float = 0.0,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
    progress: bool = True,
    description: str = "evaluating",
) -> Evaluation:
    """The bound per token of sequences, in nats, with its standard error.

    Args:
        model: dropout is off for the duration, whatever mode it is in.
        tokens: ids (S, N), cut into batches of `batch_size`, or an iterable of (B, N) batches.
        levels: a float or, with (S, N) tokens, a tensor (S, N); None is the levels that the head chooses, position by position.
        path: how levels fall on the clock.
        clock_values: per sequence. The bound is unbiased with any number; more make it more precise.
        snap: levels below this count as 0; generation with K steps snaps below 1/K.
        batch_size: sequences a pass.
        generator: of all noise.
        progress: whether to show a bar where standard error is a terminal.
        description: of the bar.

    Raises:
        ValueError: for no sequences, a level tensor of another shape, or fewer than one clock value.
    """
    if clock_values < 1:
        raise ValueError(f"clock_values is {clock_values}; at least one value of the clock is needed")
    if isinstance(levels, Tensor) and not (isinstance(tokens, Tensor) and levels.shape == tokens.shape):
        raise ValueError("levels given as a tensor need tokens given as a tensor of the same shape (S, N)")
    batches = tokens.split(batch_size) if isinstance(tokens, Tensor) else tokens
    total = math.ceil(len(tokens) / batch_size) if isinstance(tokens, Tensor) else None
    sums, counts, parts, level_sum = [], [], torch.zeros(3, dtype=torch.float64), 0.0
    with evaluating(model):
        bar = tqdm(
            batches, total=total, desc=description, unit="batch", disable=None if progress else True, leave=False
        )
        for index, chunk in enumerate(bar):
            given = levels.split(batch_size)[index] if isinstance(levels, Tensor) else levels
            batch = as_batch(model, chunk)
            chosen = as_levels(given, batch, model.latent_space.directions)
            out = measure(model, batch, batch.present, chosen, path, generator, clock_values, snap)
            sums.append(out.bound.double().sum(1).cpu())
            counts.append(torch.full((len(chunk),), chunk.shape[1], dtype=torch.float64))
            bits = torch.stack([out.sketch_bits, out.flow_bits, out.reconstruction])
            parts += bits.double().sum((1, 2)).cpu()
            level_sum += out.levels.double().sum().item()
    if not sums:
        raise ValueError("there are no sequences to evaluate: give at least one")
    per_sequence, tokens_each = torch.cat(sums), torch.cat(counts)
    count = tokens_each.sum()
    nats = per_sequence.sum() / count
    # The ratio estimator's error: residuals of each sequence from what its length would predict.
    residual = per_sequence - nats * tokens_each
    size = len(residual)
    error = (residual.square().sum() * size / max(size - 1, 1)).sqrt() / count if size > 1 else torch.tensor(math.nan)
    sketch, flow, reconstruction = (parts / count).tolist()
    return Evaluation(
        nats=nats.item(),
        standard_error=error.item(),
        sketch=sketch,
        flow=flow,
        reconstruction=reconstruction,
        mean_level=level_sum / count.item(),
        tokens=int(count),
        path=path,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration, then the mode there was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
