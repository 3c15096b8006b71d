"""Where the better end of the levels lies, as training finds it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo import Objective
from evo.core import Exploration, Extremes
from tests.conftest import generator, random_model

nats = st.floats(0.0, 10.0)


def seen(zero: float, head: float, one: float) -> Extremes:
    extremes = Extremes()
    tokens = torch.tensor([40.0, 60.0, 20.0])
    extremes.update(torch.tensor([zero, head, one]) * tokens, tokens)
    return extremes


@given(zero=nats, head=nats, one=nats)
def test_the_slope_leads_to_an_end_that_is_better_than_the_head_and_nowhere_else(zero, head, one):
    slope = seen(zero, head, one).slope().item()
    lost = max(0.0, head - min(zero, one))
    assert abs(slope) == pytest.approx(lost, abs=1e-5)
    if lost > 1e-4 and abs(zero - one) > 1e-4:
        assert (slope > 0) == (zero < one), "levels fall where level 0 is the better end"


def test_nothing_seen_is_nothing_said():
    assert Extremes().slope() == 0
    only = Extremes()
    only.update(torch.tensor([0.0, 5.0, 2.0]), torch.tensor([0.0, 1.0, 1.0]))
    assert only.slope().item() == pytest.approx(-3), "of an end that has not been seen nothing is known"
    only.update(torch.tensor([math.nan, math.inf, 2.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert only.slope().item() == pytest.approx(-3)


def test_old_figures_fade():
    extremes = seen(1.0, 1.0, 1.0)
    for _ in range(400):
        extremes.update(torch.tensor([3.0, 1.0, 2.0]), torch.ones(3))
    torch.testing.assert_close(extremes.means(), torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64), rtol=1e-2, atol=0)


@pytest.mark.parametrize("causal", [0.0, 1.0])
def test_training_tells_what_each_end_costs(causal):
    """Against the bound of the same model measured by itself, on one sequence many times, of which every row tells the same."""
    model = random_model(dtype=torch.float32).train()
    tokens = torch.randint(0, model.latent_space.vocab_size, (1, 6), generator=generator(0)).expand(64, 6)
    extremes = Extremes()
    objective = Objective(causal_weight=causal, extremes=extremes, weight_cap=1e9)
    for seed in range(40):
        model(tokens, generator=generator(seed), objective=objective)
    zero, head, one = extremes.means().tolist()
    assert zero == pytest.approx(-model.log_prob(tokens).mean().item(), rel=1e-4)
    assert one == pytest.approx(-model.log_prob(tokens, 1.0, generator=generator(1)).mean().item(), rel=0.15)
    assert math.isfinite(head)


@pytest.mark.parametrize(("zero", "one", "rises"), [(0.0, 9.0, False), (9.0, 0.0, True)])
def test_the_head_moves_to_the_better_end(zero, one, rises):
    model = random_model(dtype=torch.float32).train()
    tokens = torch.randint(0, model.latent_space.vocab_size, (8, 6), generator=generator(0))
    extremes = seen(zero, 5.0, one)
    extremes.update = lambda *_: None  # type: ignore[method-assign]
    explore = Exploration(share=0.5, noise=0.0)
    losses = [
        model(tokens, generator=generator(1), objective=Objective(extremes=given, exploration=explore)).loss
        for given in (extremes, None)
    ]
    (gradient,) = torch.autograd.grad(losses[0] - losses[1], model.timestep_head.outer.bias)
    # The mean over tokens of d logit / d bias is 1, so the slope itself arrives.
    assert gradient.item() == pytest.approx(-5.0 if rises else 5.0, rel=1e-4)


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match=r"decay is 1\.0"):
        Extremes(decay=1.0)
