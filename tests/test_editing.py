"""Rewriting a text: what is told to stay stays, what is told to go leaves no trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo.core.editing import Edited
from evo.heads import LinearDecoder, NucleusPrior
from evo.schedules import by_order, early_stop, full, late_start, step_counts
from evo.solvers import Euler, Exponential, Heun, TorchDiffEq
from tests.conftest import generator, random_model

MODEL = random_model()
V = MODEL.latent_space.vocab_size
SEEDS = st.integers(0, 10**6)


def text(seed: int, batch: int = 3, length: int = 8) -> torch.Tensor:
    return torch.randint(0, V, (batch, length), generator=generator(seed))


def chosen_levels(seed: int, batch: int = 3, length: int = 8) -> torch.Tensor:
    """Exact 0s and 1s, and anything between."""
    return (1.6 * torch.rand(batch, length, generator=generator(seed + 1), dtype=torch.float64) - 0.4).clamp(0, 1)


def edited(tokens: torch.Tensor, levels: float | torch.Tensor, seed: int = 0, **options: object) -> Edited:
    return MODEL.edit(tokens, levels, generator=generator(seed), **{"max_steps": 5, **options})


@given(
    seed=SEEDS,
    plan=st.sampled_from([early_stop, late_start, full, by_order(torch.linspace(0, 1, 8), 0.4)]),
    refresh=st.sampled_from([1, 3]),
    fidelity=st.sampled_from([None, 0.6]),
)
def test_tokens_at_level_0_come_back(seed, plan, refresh, fidelity):
    tokens, levels = text(seed), chosen_levels(seed)
    prompt, lengths = torch.tensor([0, 3, 5]), torch.tensor([8, 6, 5])
    out = edited(
        tokens, levels, seed, prompt_length=prompt, lengths=lengths, plan=plan, refresh=refresh, fidelity=fidelity
    )
    index = torch.arange(8)
    inside = (index >= prompt[:, None]) & (index < lengths[:, None])
    rewritten = inside & (step_counts(levels, 5) >= 1) & (levels > MODEL.schedule.t_min)
    assert torch.equal(out.levels, torch.where(rewritten, levels, 0.0))
    assert torch.equal(out.tokens[~rewritten], tokens[~rewritten])


def test_tokens_at_other_levels_are_rewritten():
    changed = [(edited(text(seed), 1.0, seed).tokens != text(seed)).double().mean() for seed in range(4)]
    assert 0.5 < torch.stack(changed).mean() < 1


@given(seed=SEEDS, other=SEEDS, prompt=st.integers(0, 4), refresh=st.sampled_from([1, 3]))
def test_what_a_token_at_level_1_was_leaves_no_trace(seed, other, prompt, refresh):
    levels = chosen_levels(seed)
    levels[:, :prompt] = 0
    before = text(seed)
    changed = torch.where(levels == 1, text(other), before)
    first, second = (edited(tokens, levels, prompt_length=prompt, refresh=refresh) for tokens in (before, changed))
    free = levels > 0
    assert torch.equal(first.tokens[free], second.tokens[free])
    assert first.nfe == second.nfe


def test_a_token_below_level_1_leaves_one():
    """Nearly at the lower end everything stays; the higher the level, the less does."""
    kept = [
        torch.stack([edited(text(seed), level, seed).tokens == text(seed) for seed in range(6)]).double().mean()
        for level in (0.2, 0.6, 1.0)
    ]
    assert kept[0] > 0.9
    assert kept[0] > kept[1] > kept[2]


@given(seed=SEEDS, refresh=st.sampled_from([1, 2]))
def test_a_sequence_is_rewritten_as_if_alone(seed, refresh):
    tokens, levels = text(seed), chosen_levels(seed)
    prompt, lengths = torch.tensor([0, 2, 4]), torch.tensor([7, 8, 4])
    drawn = LinearDecoder(prior=NucleusPrior(top_p=1.0, temperature=1.0))
    options = {"max_steps": 5, "refresh": refresh, "decoder": drawn}
    together = MODEL.edit(
        tokens, levels, prompt, lengths=lengths, generator=[generator(row) for row in range(3)], **options
    )
    for row in range(3):
        end = int(lengths[row])
        alone = MODEL.edit(
            tokens[row : row + 1, :end],
            levels[row : row + 1, :end],
            int(prompt[row]),
            generator=[generator(row)],
            **options,
        )
        assert torch.equal(alone.tokens[0], together.tokens[row, :end])


@given(seed=SEEDS, refresh=st.sampled_from([1, 2]))
def test_nobody_sees_what_is_behind_the_end(seed, refresh):
    tokens, levels = text(seed), chosen_levels(seed)
    lengths = torch.tensor([4, 8, 6])
    other = torch.where(torch.arange(8) < lengths[:, None], tokens, (tokens + 1) % V)
    first, second = (edited(each, levels, lengths=lengths, refresh=refresh) for each in (tokens, other))
    present = torch.arange(8) < lengths[:, None]
    assert torch.equal(first.tokens[present], second.tokens[present])


def test_the_right_context_is_seen():
    differ = 0
    for seed in range(6):
        tokens, levels = text(seed), torch.zeros(3, 8, dtype=torch.float64)
        levels[:, 2:4] = 1.0
        behind = tokens.clone()
        behind[:, 4:] = (behind[:, 4:] + 1) % V
        differ += int((edited(tokens, levels).tokens[:, 2:4] != edited(behind, levels).tokens[:, 2:4]).sum())
    assert differ > 0


def test_the_same_seed_rewrites_alike_and_another_does_not():
    tokens = text(0)
    assert torch.equal(edited(tokens, 0.9, 1).tokens, edited(tokens, 0.9, 1).tokens)
    assert len({tuple(edited(tokens, 1.0, seed).tokens.flatten().tolist()) for seed in range(5)}) > 1


def test_nothing_to_rewrite_costs_nothing():
    out = edited(text(0), 0.05)
    assert out.nfe == 0
    assert torch.equal(out.tokens, text(0))
    assert (out.levels == 0).all()
    everything_is_prompt = edited(text(0), 1.0, prompt_length=8)
    assert everything_is_prompt.nfe == 0


@pytest.mark.parametrize("name", ["heun", "exponential", "dopri5"])
def test_any_solver_rewrites(name):
    solver = {
        "heun": Heun(),
        "exponential": Exponential(schedule=MODEL.schedule),
        "dopri5": TorchDiffEq("dopri5", rtol=1e-4, atol=1e-4),
    }[name]
    out = edited(text(0), chosen_levels(0), solver=solver)
    assert out.tokens.shape == (3, 8)
    assert out.nfe >= 5


def test_single_precision_and_detached_bos():
    for options in ({"dtype": torch.float32}, {"bos": "detached"}):
        model = random_model(**options)
        out = model.edit(text(0), 1.0, max_steps=4, generator=generator(0))
        assert out.tokens.shape == (3, 8)
        assert out.nfe == 4
        assert out.levels.dtype == (torch.float32 if "dtype" in options else torch.float64)


def test_the_mode_stays_as_it_was():
    model = random_model()
    model.train()
    model.edit(text(0), 0.5, max_steps=3, generator=generator(0))
    assert model.training


@settings(max_examples=6)
@given(seed=SEEDS, prompt=st.integers(1, 4))
def test_an_order_speaks_of_tokens_of_the_text(seed, prompt):
    """What it says of the prompt does not matter, and what it says of each other token does, wherever the prompt ends."""
    tokens, seen = text(seed), []

    class Spy(Euler):
        def step(self, field, latents, level, next_level, state):
            seen.append((level, next_level))
            return super().step(field, latents, level, next_level, state)

    order = torch.rand(3, 8, generator=generator(seed), dtype=torch.float64)
    path = by_order(order, 0.3)
    out = edited(tokens, 1.0, prompt_length=prompt, plan=path, solver=Spy())
    other = torch.cat([1 - order[:, :prompt], order[:, prompt:]], 1)
    assert torch.equal(edited(tokens, 1.0, prompt_length=prompt, plan=by_order(other, 0.3)).tokens, out.tokens)
    rows = path(out.levels, 5, MODEL.schedule.t_min)[:, :, prompt:]
    for level, _ in seen:
        assert (rows == level[:, None]).all(2).any(1).all(), "the window is at no row of the plan of the text"
    with pytest.raises(ValueError, match=r"needs \(8,\)"):
        edited(tokens, 1.0, prompt_length=prompt, plan=by_order(order[:, prompt:], 0.3))


def test_bad_requests_are_refused_and_leave_the_model_usable():
    model = random_model()
    tokens = text(0)
    before = model.edit(tokens, 1.0, max_steps=3, generator=generator(0)).tokens
    for levels, match in (
        (1.5, "got 1.5"),
        (torch.full((3, 8), torch.nan), "got nan"),
        (torch.zeros(3, 7), r"of shape \(3, 8\)"),
        (None, "levels is None"),
    ):
        with pytest.raises(ValueError, match=match):
            model.edit(tokens, levels, max_steps=3)
    with pytest.raises(ValueError, match="max_steps is 0"):
        model.edit(tokens, 1.0, max_steps=0)
    with pytest.raises(ValueError, match="prompt_length must lie in"):
        model.edit(tokens, 1.0, 9)
    with torch.no_grad():
        kept = model.backbone.own_role.clone()
        model.backbone.own_role[0] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinite latents while refining"):
            model.edit(tokens, 1.0, max_steps=3)
        model.backbone.own_role.copy_(kept)
    assert torch.equal(model.edit(tokens, 1.0, max_steps=3, generator=generator(0)).tokens, before)
