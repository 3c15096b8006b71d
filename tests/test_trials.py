"""Single levels tried at their other end: what is moved, what it is taken to say, and what a head learns from it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evo
from evo import Objective
from evo.core import Exploration, Extremes
from evo.core.trials import Trial
from tests.conftest import generator, random_model

seeds = st.integers(0, 10**6)


@given(seed=seeds, count=st.integers(1, 5), length=st.integers(1, 80))
def test_one_free_token_of_each_sequence_is_moved_to_the_farther_end(seed, count, length):
    draws = generator(seed)
    levels, u = torch.rand(2, count, length, generator=draws, dtype=torch.float64)
    free = torch.rand(count, length, generator=draws) < torch.rand(count, 1, generator=draws)
    trial = Trial.of(levels, free, u)
    assert not (trial.moved & ~free).any()
    for moved, tokens in zip(trial.moved.sum(1).tolist(), free.sum(1).tolist(), strict=True):
        assert moved == min(tokens, 1)
    assert torch.equal(trial.levels[~trial.moved], levels[~trial.moved])
    assert ((trial.levels - levels).abs() >= 0.5)[trial.moved].all()
    assert set(trial.levels[trial.moved].tolist()) <= {0.0, 1.0}


@given(seed=seeds)
def test_every_free_token_has_its_turn(seed):
    u = torch.rand(400, 5, generator=generator(seed))
    free = torch.tensor([False, True, True, True, True]).expand(400, 5)
    share = Trial.of(torch.zeros(400, 5), free, u).moved.double().mean(0)
    torch.testing.assert_close(share, torch.tensor([0, 0.25, 0.25, 0.25, 0.25], dtype=torch.float64), atol=0.12, rtol=0)


@given(beyond=st.floats(-9, 9), seed=seeds)
def test_levels_move_the_way_that_was_cheaper(beyond, seed):
    levels = torch.rand(1, 33, generator=generator(seed), dtype=torch.float64)
    trial = Trial.of(levels, torch.ones(1, 33, dtype=torch.bool), levels)
    slope = trial.slope(torch.tensor([beyond], dtype=torch.float64))
    assert slope[~trial.moved].abs().max() == 0
    upward = (trial.levels > levels)[trial.moved]
    # A loss `slope * logit` moves levels against the sign of the slope.
    assert torch.equal(slope[trial.moved], (2 * upward.double() - 1) * beyond)


@given(seed=seeds, length=st.integers(1, 300))
def test_the_slope_of_a_token_is_what_moving_it_costs_whatever_the_others_cost(seed, length):
    draws = generator(seed)
    cost, u = torch.randn(2, 64, length, generator=draws, dtype=torch.float64)
    trial = Trial.of(torch.zeros_like(cost), torch.ones(64, length, dtype=torch.bool), u)
    slope = trial.slope((trial.moved * cost).sum(1))
    assert torch.equal(slope[trial.moved], cost[trial.moved])


@pytest.mark.parametrize(("price", "causal"), [(0.0, 0.0), (3.0, 1.0)])
def test_what_is_found_by_trial_is_what_the_bound_says(price, causal):
    """Against the bound of each level alone at 1, of a head that has all of them at 0; on one sequence many times."""
    model, length = random_model(dtype=torch.float32).train(), 4
    logit = -8.0  # realised, but not yet so far that the push is spared
    with torch.no_grad():
        model.timestep_head.outer.weight.zero_()
        model.timestep_head.outer.bias.fill_(logit / model.timestep_head.gain)
    one = torch.randint(0, model.latent_space.vocab_size, (1, length), generator=generator(0))
    tokens, found = one.expand(128, length), []
    for seed in range(10):
        losses = [
            model(
                tokens,
                generator=generator(seed),
                objective=Objective(
                    causal_weight=causal,
                    level_price=price,
                    trials=trials,
                    weight_cap=1e9,
                    exploration=Exploration(share=0.0, noise=0.0),
                ),
            ).loss
            for trials in (0.0, 1.0)
        ]
        (gradient,) = torch.autograd.grad(losses[1] - losses[0], model.timestep_head.outer.bias)
        found.append(gradient.item() / model.timestep_head.gain)

    def cost(levels: torch.Tensor) -> float:
        given = evo.evaluate(
            model, tokens[:64], levels.expand(64, length), clock_values=32, generator=generator(1), batch_size=64
        )
        return given.nats * length + price * levels.sum().item()

    nothing = cost(torch.zeros(length))
    # One level of each sequence is moved; the loss is a mean over tokens.
    expected = sum(cost(row) - nothing for row in torch.eye(length)) / length**2
    values = torch.tensor(found)
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values)) + 0.01
    assert values.std() / math.sqrt(len(values)) < 0.2 * abs(expected)


def total_first(count: int, draws: torch.Generator, modulus: int = 5) -> torch.Tensor:
    """Three numbers, their sum, and then the sums of the first and of the first two, (count, 6)."""
    numbers = torch.randint(modulus, (count, 3), generator=draws)
    sums = numbers.cumsum(1) % modulus
    return torch.cat([numbers, sums[:, 2:], sums[:, :2]], 1)


def test_a_head_at_one_end_finds_the_one_token_that_is_better_at_the_other():
    """The network codes the total from what follows it. Every level is 0 to begin with, from where the gradient leads nowhere."""
    torch.manual_seed(0)
    model = evo.Evo.from_preset("tiny", vocab_size=5, width=32, depth=2, heads=2, latent_dim=8, context=8).train()
    draws, best = generator(0), torch.tensor([0.0, 0, 0, 1, 0, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        tokens = total_first(64, draws)
        model(tokens, levels=best.expand(64, 6), prompt_length=3, generator=draws).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
    model.timestep_head.requires_grad_(True)
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    answer = (torch.arange(6) >= 3).expand(128, 6)
    found = {}
    for trials in (0.0, 1.0):
        model.load_state_dict(begun)
        with torch.no_grad():
            model.timestep_head.outer.bias.fill_(-12 / model.timestep_head.gain)
        objective = Objective(
            aux_weight=0.0,
            entropy_weight=0.0,
            trials=trials,
            extremes=Extremes(),
            exploration=Exploration(share=0.25, noise=0.5),
        )
        optimizer = torch.optim.AdamW(model.timestep_head.parameters(), lr=1e-2)
        for step in range(60):
            out = model(total_first(48, draws), prompt_length=3, generator=generator(step), objective=objective)
            objective.observe(out.observed)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, levels in (("own", None), ("zero", 0.0), ("one", 1.0)):
            given = {"prompt_length": 3, "loss_mask": answer, "batch_size": 128, "generator": generator(2)}
            found[trials, name] = evo.evaluate(model, total_first(128, generator(1)), levels, **given)
    assert found[0.0, "own"].mean_level < 0.01, "without trials the head stays where it is"
    assert found[1.0, "own"].nats < 0.6 * min(found[1.0, "zero"].nats, found[1.0, "one"].nats), "better than both ends"
    assert 0.2 < found[1.0, "own"].mean_level < 0.5
