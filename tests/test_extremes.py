"""Where the better end of the levels lies, as training finds it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evo import Objective
from evo.core import Exploration, Extremes
from tests.conftest import generator, random_model

nats = st.floats(-5.0, 5.0)


def seen(beyond_zero: float, beyond_one: float, noise: float = 0.0, steps: int = 50) -> Extremes:
    """Extremes that have found the head so much dearer than either end, with noise from step to step."""
    extremes, draws = Extremes(), generator(0)
    for _ in range(steps):
        ends = 3 - torch.tensor([beyond_zero, beyond_one]) - noise * torch.randn(2, generator=draws)
        extremes.update(tally(3.0, ends.tolist(), (40, 20)))
    return extremes


def tally(head: float, ends: Sequence[float], tokens: tuple[int, int]) -> torch.Tensor:
    """Of a step that found these nats per token at the head's levels, on 60 tokens, and at both ends, on so many."""
    found = [
        (torch.full((1, count), float(nats)), torch.ones(1, count, dtype=torch.bool))
        for nats, count in zip((head, *ends), (60, *tokens), strict=True)
    ]
    return Extremes.tally(*found)


@given(zero=nats, one=nats)
def test_the_slope_leads_to_an_end_that_is_better_than_the_head_and_nowhere_else(zero, one):
    slope = seen(zero, one).slope().item()
    assert abs(slope) == pytest.approx(10 * max(0.0, zero, one), abs=1e-3)
    if max(zero, one) > 1e-4 and abs(zero - one) > 1e-4:
        assert (slope > 0) == (zero > one), "levels fall where level 0 is the better end"


def test_a_difference_within_its_error_is_none():
    sure, unsure = seen(0.1, -1.0, noise=0.1), seen(0.1, -1.0, noise=3.0)
    assert 0.2 < sure.slope() < 1.2
    assert unsure.slope() == 0


def test_the_standard_error_is_that_of_repetition():
    runs = []
    for seed in range(60):
        extremes, draws = Extremes(decay=0.95), generator(seed)
        for _ in range(120):
            extremes.update(tally(0.0, torch.randn(2, generator=draws).tolist(), (7, 7)))
        runs.append(torch.stack(extremes.beyond()))
    means, errors = torch.stack(runs).unbind(1)
    torch.testing.assert_close(errors.mean(0), means.std(0), rtol=0.25, atol=0)


def test_nothing_seen_is_nothing_said():
    assert Extremes().slope() == 0
    extremes = Extremes()
    for _ in range(3):
        extremes.update(tally(5.0, (math.nan, 2.0), (0, 1)))
    assert extremes.slope().item() == pytest.approx(-30), "of an end that has not been seen nothing is known"
    for bad in (math.nan, math.inf):
        extremes.update(tally(bad, (1.0, 1.0), (1, 1)))
    assert extremes.slope().item() == pytest.approx(-30)
    once = Extremes()
    once.update(tally(5.0, (1.0, 2.0), (1, 1)))
    assert once.slope() == 0, "one step has no error to be beyond"
    for _ in range(50):
        once.update(tally(5.0, (math.nan, math.nan), (0, 0)))
        assert once.slope() == 0, "nor has it one as its weight fades"


def test_old_figures_fade():
    extremes = seen(1.0, 1.0)
    for _ in range(1500):
        extremes.update(tally(3.0, (0.0, 2.0), (1, 1)))
    torch.testing.assert_close(extremes.beyond()[0], torch.tensor([3.0, 1.0], dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("causal", [0.0, 1.0])
@pytest.mark.parametrize("price", [0.0, 0.7])
def test_training_tells_what_the_head_costs_beyond_each_end(causal, price):
    """Against the bound of the same model measured by itself, on one sequence many times, with a head that is sure of one level."""
    model = random_model(dtype=torch.float32).train()
    with torch.no_grad():
        model.timestep_head.outer.weight.zero_()
        model.timestep_head.outer.bias.zero_()
    tokens = torch.randint(0, model.latent_space.vocab_size, (1, 6), generator=generator(0)).expand(64, 6)
    extremes = Extremes(decay=0.999)
    explore = Exploration(share=0.5, noise=0.0, masked=0.25)
    objective = Objective(
        causal_weight=causal, level_price=price, extremes=extremes, weight_cap=1e9, exploration=explore
    )
    for seed in range(40):
        objective.observe(model(tokens, generator=generator(seed), objective=objective).observed)
    zero, half, one = (
        -model.log_prob(tokens, level, generator=generator(1)).mean().item() + price * level
        for level in (0.0, 0.5, 1.0)
    )
    mean, error = extremes.beyond()
    assert abs(mean[0] - (half - zero)) < 4 * error[0] + 0.05
    assert abs(mean[1] - (half - one)) < 4 * error[1] + 0.05
    assert (error < 0.1 * (half + one)).all()


@pytest.mark.parametrize(("zero", "one", "slope"), [(5.0, -4.0, 50.0), (-4.0, 5.0, -50.0), (-1.0, -1.0, 0.0)])
def test_the_head_moves_to_the_better_end(zero, one, slope):
    model = random_model(dtype=torch.float32).train()
    tokens = torch.randint(0, model.latent_space.vocab_size, (8, 6), generator=generator(0))
    extremes = seen(zero, one)
    explore = Exploration(share=0.5, noise=0.0)
    losses = [
        model(tokens, generator=generator(1), objective=Objective(extremes=given, exploration=explore)).loss
        for given in (extremes, None)
    ]
    (gradient,) = torch.autograd.grad(losses[0] - losses[1], model.timestep_head.outer.bias)
    # The mean over tokens of d logit / d bias is the gain of the head.
    assert gradient.item() == pytest.approx(slope * model.timestep_head.gain, rel=1e-4, abs=1e-3)


@given(zero=st.floats(-5, 5), one=st.floats(-5, 5), bias=st.floats(-60, 15))
def test_a_level_is_pushed_until_it_has_arrived_and_back_from_anywhere(zero, one, bias):
    """However sure a head is of one end, the other, once it is better, has its full slope."""
    assume(abs(abs(bias) - 9.2) > 0.01)
    logit = torch.tensor(bias, requires_grad=True)
    extremes = seen(zero, one)
    extremes.push(logit.sigmoid()).backward()
    slope = extremes.slope().item()
    arrived = slope * bias <= -9.2 * abs(slope)
    assert logit.grad.item() == pytest.approx(0.0 if arrived else slope, rel=2e-2)


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"gain": -1.0}, {"doubt": -0.1}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="needed decay in"):
        Extremes(**options)
