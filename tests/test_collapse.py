"""The timestep head goes where the data wants it, and to neither end of itself."""

from __future__ import annotations

import math

import pytest
import torch

import evo
from evo import Objective
from evo.core import ClockDensity, Exploration, Extremes
from tests.conftest import generator

V = 4


def small(vocab_size: int) -> evo.Evo:
    torch.manual_seed(0)
    size = {"width": 32, "depth": 2, "heads": 2, "latent_dim": 8, "context": 16}
    return evo.Evo.from_preset("tiny", vocab_size=vocab_size, **size).train()


def echoes(count: int, draws: torch.Generator, length: int = 6) -> torch.Tensor:
    """A key, and behind it tokens that are each the key with probability .7, else any: nothing to plan, all of it readable."""
    key = torch.randint(V, (count, 1), generator=draws)
    any_token = torch.randint(V, (count, length), generator=draws)
    kept = torch.rand(count, length, generator=draws) < 0.7
    return torch.cat([key + V, torch.where(kept, key, any_token)], 1)


ECHO_ENTROPY = -(0.775 * math.log(0.775) + 3 * 0.075 * math.log(0.075))


def constant(count: int, draws: torch.Generator, length: int = 6) -> torch.Tensor:
    """One token, many times."""
    return torch.randint(V, (count, 1), generator=draws).expand(-1, length)


def teach_head(model: evo.Evo, batches, objective: Objective, **given) -> None:
    """Train the timestep head alone, on whatever batches come."""
    model.requires_grad_(False)
    model.timestep_head.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.timestep_head.parameters(), lr=2e-2)
    for index, tokens in enumerate(batches):
        out = model(tokens, generator=generator(index), objective=objective, **given)
        objective.observe(out.observed)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_tokens_that_are_independent_given_the_prompt_are_not_planned():
    """Either half can code them, so a small price of refinement decides."""
    model, draws, steps = small(2 * V), generator(0), 160
    clock = ClockDensity()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 30, 4 * (1 - step / steps))
        objective = Objective(causal_weight=1.0, clock=clock, exploration=Exploration(share=1.0))
        out = model(echoes(48, draws), prompt_length=1, generator=draws, objective=objective)
        objective.observe(out.observed)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = echoes(512, generator(1))
    answer = torch.ones_like(tokens, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)

    def found(levels: float | None) -> evo.Evaluation:
        return evo.evaluate(
            model, tokens, levels, prompt_length=1, loss_mask=answer, batch_size=256, generator=generator(2)
        )

    ends = [found(end).nats for end in (0.0, 1.0)]
    objective = Objective(
        aux_weight=0.0, level_price=0.1, clock=clock, extremes=Extremes(), exploration=Exploration(noise=0.5)
    )
    teach_head(model, (echoes(48, draws) for _ in range(150)), objective, prompt_length=1)
    learned = found(None)
    assert learned.mean_level < 0.15
    assert learned.nats < 1.05 * min(ends)
    assert learned.nats == pytest.approx(ECHO_ENTROPY, rel=0.1)


@pytest.mark.parametrize(("written_at", "low", "high"), [(0.0, 0.0, 0.2), (1.0, 0.8, 1.0)])
def test_a_head_goes_to_the_half_that_can_code_the_data(written_at, low, high):
    """One half has been trained and the other has not: the head, trained alone, leaves the one that cannot write it."""
    model, draws = small(V), generator(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        model(constant(32, draws), levels=written_at, generator=draws).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ends = [
        -model.log_prob(constant(64, generator(1)), end, generator=generator(2)).mean().item() for end in (0.0, 1.0)
    ]
    assert (ends[0] < ends[1]) == (written_at == 0.0), "the half that was trained should code better"
    objective = Objective(aux_weight=0.0, extremes=Extremes(), exploration=Exploration(share=0.5, noise=0.5))
    teach_head(model, (constant(32, draws) for _ in range(100)), objective)
    found = evo.evaluate(model, constant(64, generator(1)), None, batch_size=64, generator=generator(2))
    assert low <= found.mean_level <= high
    assert found.nats < min(ends) + 4 * found.standard_error + 0.05
