"""Where the flow is measured: any density gives the integral, and the learned one gives it with less variance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.core import ClockDensity
from evo.core.chance import Chance
from evo.schedules import early_stop
from tests.conftest import generator, random_model


def taught(seed: int, **options) -> ClockDensity:
    """A density that has seen an integrand with a peak, and the rest of the clock now and then."""
    density = ClockDensity(**options)
    draws = generator(seed)
    for _ in range(20):
        r = torch.rand(64, generator=draws, dtype=torch.float64)
        density.update(density.tally(r, peak(r)))
    return density


def peak(r: torch.Tensor) -> torch.Tensor:
    return 0.1 + 20 * torch.exp(-0.5 * ((r - 0.45) / 0.06).square())


@given(seed=st.integers(0, 10**6), length=st.floats(0.0, 1.0), bins=st.integers(1, 40), floor=st.floats(0.05, 1.0))
def test_the_weights_integrate_to_the_length(seed, length, bins, floor):
    # A midpoint rule in the uniform share: E[weight] is the length for every density, exactly where it is piecewise constant.
    density = taught(seed, bins=bins, floor=floor)
    count = 20_000
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    r, weight = density(share, torch.full((count,), length, dtype=torch.float64))
    assert (r >= 0).all()
    assert (r <= length).all()
    assert (weight <= 1 / floor + 1e-9).all()
    assert (r[1:] >= r[:-1]).all()
    assert weight.mean().item() == pytest.approx(length, abs=2e-3)


@given(seed=st.integers(0, 10**6), length=st.floats(0.05, 1.0))
def test_the_integral_is_that_of_uniform_sampling(seed, length):
    density = taught(seed)
    count = 50_000
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    lengths = torch.full((count,), length, dtype=torch.float64)
    r, weight = density(share, lengths)
    assert (weight * peak(r)).mean().item() == pytest.approx((length * peak(length * share)).mean().item(), rel=5e-3)


def test_the_variance_falls():
    density = taught(0)
    share = torch.rand(20_000, generator=generator(1), dtype=torch.float64)
    lengths = torch.ones_like(share)
    r, weight = density(share, lengths)
    learned, uniform = weight * peak(r), peak(share)
    assert learned.mean().item() == pytest.approx(
        uniform.mean().item(), abs=5 * uniform.std().item() / math.sqrt(20_000)
    )
    assert learned.var() < uniform.var() / 3


def test_a_floor_of_one_is_uniform_and_so_is_a_density_that_has_seen_nothing():
    share = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    lengths = torch.linspace(0, 1, 50, dtype=torch.float64)
    for density in (ClockDensity(), taught(0, floor=1.0)):
        r, weight = density(share, lengths)
        torch.testing.assert_close(r, share * lengths)
        torch.testing.assert_close(weight, lengths)


def test_what_is_not_finite_is_not_learned_from():
    density = taught(0)
    before = density.probabilities()
    density.update(density.tally(torch.tensor([0.1, 0.9]), torch.tensor([math.nan, math.inf])))
    torch.testing.assert_close(density.probabilities(), before)


@pytest.mark.parametrize("options", [{"bins": 0}, {"floor": 0.0}, {"floor": 1.5}, {"decay": 1.0}])
def test_impossible_densities_are_refused(options):
    with pytest.raises(ValueError, match="needed bins"):
        ClockDensity(**options)


def test_the_flow_of_a_model_is_the_same_in_expectation_and_of_smaller_variance():
    """On the model's own integrand: bits measured at importance-sampled clock values against uniform ones."""
    from evo.core.bound import Sketch
    from evo.core.contract import as_batch

    model = random_model()
    tokens = torch.randint(0, model.latent_space.vocab_size, (400, 6), generator=generator(3))
    batch = as_batch(model, tokens)
    draws = generator(4)
    noise = torch.randn(*tokens.shape, model.latent_space.dim, generator=draws, dtype=torch.float64)
    chance = Chance(draws, len(tokens))
    density, found = ClockDensity(), {True: [], False: []}
    with torch.no_grad():
        sketch = Sketch(model, batch, torch.ones(tokens.shape, dtype=torch.float64), noise)
        for step in range(12):
            clock = (torch.arange(len(tokens)) / len(tokens) + torch.rand(1, generator=draws, dtype=noise.dtype)) % 1
            for learned in (True, False):
                flow = sketch.flow_bits(early_stop, clock, chance, density=density if learned else None)
                density.update(density.tally(flow.remaining, flow.integrand.sum(1)))
                if step >= 2:
                    found[learned].append(flow.bits.sum(1))
    learned, uniform = (torch.cat(found[key]) for key in (True, False))
    error = math.hypot(learned.std().item(), uniform.std().item()) / math.sqrt(len(learned))
    assert abs(learned.mean() - uniform.mean()).item() < 4 * error
    assert learned.var() < 0.8 * uniform.var()
