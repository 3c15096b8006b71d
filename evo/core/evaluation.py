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

from evo.core.bound import Batch, Sketch, learned_levels
from evo.core.chance import Chance
from evo.core.contract import Lengths, as_batch, as_count, as_levels, as_mask, as_part, as_rows, check_path
from evo.core.objective import Output
from evo.core.part import Part
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

    def bits_per(self, units: float) -> dict[str, float | str]:
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
    chance: Chance,
    part: Part,
    clock_values: int,
    snap: float = 0.0,
) -> Output:
    """The bound of each token at given levels (B, N), or at the head's own (None), from `clock_values` values of the clock a sequence.

    Each sequence has its clock values stratified over [0, 1] behind an offset of its own. Levels below `snap` become 0.
    """
    noise = chance.normal(batch.tokens.shape[1], model.latent_space.dim, like=model.bos)
    if levels is None:
        levels = learned_levels(model, batch, noise, snap)
    levels = torch.where(levels < snap, 0.0, levels)
    sketch = Sketch(model, batch, levels, noise)
    bits, _ = sketch.bits()
    flow = reconstruction = torch.zeros_like(bits)
    # Nothing is left to refine at level 0: one pass instead of several. (A compiled pass cannot look; the zeros are exact either way.)
    if torch.compiler.is_compiling() or sketch.live.any():
        offset = chance.uniform(like=noise)
        for index in range(clock_values):
            flow = flow + sketch.flow_bits(path, (offset + index) / clock_values, chance).bits / clock_values
        reconstruction = sketch.reconstruction(chance, network=True)
    bound = bits + flow + reconstruction
    return Output(
        loss=(bound * scored).sum() / part.count,
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
    prompt_length: Lengths | None = None,
    lengths: Lengths | None = None,
    suffix_length: Lengths | None = None,
    documents: Tensor | None = None,
    loss_mask: Tensor | None = None,
    path: Path = early_stop,
    clock_values: int = 8,
    snap: float = 0.0,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
    progress: bool = True,
    description: str = "evaluating",
) -> Evaluation:
    """The bound per token of sequences, in nats, with its standard error.

    How many passes a batch needs depends on its tokens: ranks that share the weights of a model must give the same sequences, or put the
    weights together before (`evo.training.parallel.gathered`).

    Args:
        model: dropout is off for the duration, whatever mode it is in.
        tokens: ids (S, N), cut into batches of `batch_size`, or an iterable of (B, N) batches.
        levels: a float or a tensor, (S, N) or (S, 1); None is the levels that the head chooses, position by position.
        prompt_length: leading tokens that are prompt, int or (S,); they have level 0 and see no later token.
        lengths: (S,) tokens present in each right-padded sequence; None is all.
        suffix_length: trailing tokens that are clean context on the right, int or (S,); nobody codes them.
        documents: ids (S, N) int64 of documents that share a sequence without seeing each other; None is one a sequence.
        loss_mask: bool (S, N), what is scored; None is everything present that is not suffix. The bound on -log p(window | prompt, suffix)
            alone leaves the prompt out, which costs what it costs without a suffix.
        path: how levels fall on the clock.
        clock_values: per sequence. The bound is unbiased with any number; more make it more precise.
        snap: levels below this count as 0; generation with K steps snaps below 1/K.
        batch_size: sequences a pass.
        generator: of all noise.
        progress: whether to show a bar where standard error is a terminal.
        description: of the bar.

    Raises:
        ValueError, TypeError: for no sequences, nothing scored, fewer than one clock value or sequence a pass, or a tensor beside
            `tokens` that does not have a row for each sequence; tensors (S, ...) need tokens given as one tensor too.
    """
    clock_values, batch_size = as_count("clock_values", clock_values), as_count("batch_size", batch_size)
    check_path(path)
    beside = {
        "levels": levels,
        "prompt_length": as_rows("prompt_length", prompt_length),
        "lengths": as_rows("lengths", lengths),
        "suffix_length": as_rows("suffix_length", suffix_length),
        "documents": documents,
        "loss_mask": loss_mask,
    }
    for name, value in beside.items():
        if not isinstance(value, Tensor):
            continue
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"{name} has a row for each sequence, {tuple(value.shape)}; it needs tokens given as one tensor too"
            )
        if value.shape[:1] != tokens.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, tokens {tuple(tokens.shape)}; it needs a row for each sequence"
                + (", or one number" if value.dim() == 0 else "")
            )

    batches = tokens.split(batch_size) if isinstance(tokens, Tensor) else tokens
    total = math.ceil(len(tokens) / batch_size) if isinstance(tokens, Tensor) else None
    sums, counts, parts, level_sum = [], [], torch.zeros(3, dtype=torch.float64), 0.0
    with evaluating(model):
        bar = tqdm(
            batches, total=total, desc=description, unit="batch", disable=None if progress else True, leave=False
        )
        for index, chunk in enumerate(bar):
            here = slice(index * batch_size, (index + 1) * batch_size)
            rows = {name: value[here] if isinstance(value, Tensor) else value for name, value in beside.items()}
            batch = as_batch(
                model, chunk, rows["prompt_length"], rows["lengths"], rows["suffix_length"], rows["documents"]
            )
            scored = as_mask(rows["loss_mask"], batch)
            chosen = as_levels(rows["levels"], chunk.shape, model.bos)
            chance, part = Chance(generator, len(chunk)), as_part(None, batch, scored)
            out = measure(model, batch, scored, chosen, path, chance, part, clock_values, snap)
            sums.append((out.bound * scored).double().sum(1).cpu())
            counts.append(scored.double().sum(1).cpu())
            bits = torch.stack([out.sketch_bits, out.flow_bits, out.reconstruction]) * scored
            parts += bits.double().sum((1, 2)).cpu()
            level_sum += (out.levels * scored).double().sum().item()
    if not sums:
        raise ValueError("there are no sequences to evaluate: give at least one")
    per_sequence, tokens_each = torch.cat(sums), torch.cat(counts)
    count = tokens_each.sum()
    if not count:
        raise ValueError("loss_mask scores no token at all: let it be True somewhere")
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
    """Evaluation mode for the duration, then the mode that each module had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # some modules do more than to note it
        for module, training in modes:
            module.training = training
