"""Hypothesis strategies for levels, spans, schedules, paths, plans and targets with closed-form scores.

    from hypothesis import given
    from evo.testing import strategies

    @given(strategies.schedules(), strategies.levels())
    def test_mine(schedule, levels): ...

Tensors are float64. This is the one module of `evo.testing` that needs Hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from evo.schedules import (
    Cosine,
    InformationUniform,
    Learned,
    LinearVP,
    Path,
    RectifiedFlow,
    Schedule,
    Shifted,
    Sigmoid,
    VarianceExploding,
    by_order,
    early_stop,
    full,
    late_start,
)
from evo.testing.targets import EnumeratedTokens, Gaussian, GaussianMixture

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("evo.testing.strategies needs Hypothesis: pip install hypothesis, or evo-lm[dev]") from error


KINDS: tuple[Callable[[], Schedule], ...] = (
    Cosine,
    LinearVP,
    VarianceExploding,
    RectifiedFlow,
    Sigmoid,
    Learned,
    partial(InformationUniform, radius=2.4, vocab_size=16),
)


@st.composite
def schedules(draw: st.DrawFn, shifted: bool = True) -> Schedule:
    """Any schedule of the library, new and in float64, as it is or shifted in log-SNR."""
    schedule = draw(st.sampled_from(KINDS))()
    shift = draw(st.sampled_from((0.0, -2.0, 1.0))) if shifted else 0.0
    return (Shifted(schedule, shift) if shift else schedule).double()


@st.composite
def levels(
    draw: st.DrawFn, batch: int | None = None, tokens: int | None = None, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Levels (B, N) in [low, high], both ends, t_min and points of a grid of 20 steps among them; B <= 3 and N <= 5 unless given."""
    batch = draw(st.integers(1, 3)) if batch is None else batch
    tokens = draw(st.integers(1, 5)) if tokens is None else tokens
    special = [x for x in (low, high, 0.1, *(k / 20 for k in range(21))) if low <= x <= high]
    value = st.sampled_from(special) | st.floats(low, high)
    values = draw(st.lists(value, min_size=batch * tokens, max_size=batch * tokens))
    return torch.tensor(values, dtype=torch.float64).view(batch, tokens)


@st.composite
def spans(
    draw: st.DrawFn, batch: int | None = None, tokens: int | None = None, low: float = 0.1, high: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(start, end), both (B, N) in [low, high] with end <= start; tokens that start where they end are among them."""
    start = draw(levels(batch, tokens, low, high))
    kept = draw(levels(*start.shape))
    return start, low + kept * (start - low)


@st.composite
def paths(draw: st.DrawFn, tokens: int) -> Path:
    """Any path of the library for N tokens."""
    order = st.lists(st.floats(0, 1), min_size=tokens, max_size=tokens).map(
        lambda turns: torch.tensor(turns, dtype=torch.float64)
    )
    ordered = st.builds(by_order, order, st.floats(0.05, 1))
    return draw(st.sampled_from((early_stop, late_start, full)) | ordered)


@st.composite
def plans(draw: st.DrawFn) -> Tensor:
    """A plan (B, K+1, N) of any path, K at most 24."""
    start = draw(levels())
    return draw(paths(start.shape[1]))(start, draw(st.integers(1, 24)))


@st.composite
def gaussian_targets(draw: st.DrawFn, schedule: Schedule | None = None, dim: int = 2) -> Gaussian:
    """A Gaussian with a mean and a variance per dimension, under `schedule` or any."""
    return Gaussian(
        schedule=draw(schedules()) if schedule is None else schedule,
        mean=draw(_vector(dim, -2, 2)),
        variance=draw(_vector(dim, 0.05, 2)),
    )


@st.composite
def mixture_targets(draw: st.DrawFn, schedule: Schedule | None = None, dim: int = 2) -> GaussianMixture:
    """A mixture of one to four Gaussians, under `schedule` or any."""
    components = draw(st.integers(1, 4))
    weights = draw(_vector(components, 0.1, 1))
    return GaussianMixture(
        schedule=draw(schedules()) if schedule is None else schedule,
        weights=weights / weights.sum(),
        means=draw(_vector(components * dim, -2, 2)).view(components, dim),
        variances=draw(_vector(components, 0.05, 1)),
    )


@st.composite
def enumerated_tokens(
    draw: st.DrawFn, schedule: Schedule | None = None, max_vocab: int = 4, max_length: int = 3
) -> EnumeratedTokens:
    """A random distribution over sequences, from nearly certain to nearly even, with embeddings on a sphere of radius √(2·ln V)."""
    vocab_size, length = draw(st.integers(2, max_vocab)), draw(st.integers(1, max_length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    sharpness = draw(st.floats(0, 4))
    logits = sharpness * torch.randn((vocab_size,) * length, dtype=torch.float64, generator=generator)
    directions = torch.randn(vocab_size, 2 * vocab_size, dtype=torch.float64, generator=generator)
    return EnumeratedTokens(
        schedule=draw(schedules()) if schedule is None else schedule,
        probabilities=logits.flatten().softmax(0).view_as(logits),
        embeddings=math.sqrt(2 * math.log(vocab_size)) * torch.nn.functional.normalize(directions, dim=-1),
    )


def _vector(size: int, low: float, high: float) -> st.SearchStrategy[Tensor]:
    values = st.lists(st.floats(low, high), min_size=size, max_size=size)
    return values.map(lambda found: torch.tensor(found, dtype=torch.float64))
