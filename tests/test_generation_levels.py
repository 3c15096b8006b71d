"""Levels that are given to what is written: for all tokens, for each, for each sequence or position; and such as are final at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.core import Speculation
from evo.heads import FixedTimestep
from evo.schedules import Cosine, by_order, early_stop, full, late_start, step_counts
from tests.conftest import generator, random_model

MODEL = random_model()
V = MODEL.latent_space.vocab_size


def prompt_of(seed: int, batch: int = 2, length: int = 4) -> torch.Tensor:
    return torch.randint(0, V, (batch, length), generator=generator(seed))


@given(seed=st.integers(0, 10**6), level=st.sampled_from([0.0, 0.5, 1.0]), window=st.sampled_from([3, None]))
def test_one_level_for_all_is_a_head_that_says_so(seed, level, window):
    options = {"window": window, "max_steps": 3}
    for levels in (level, torch.full((2, 7), level), torch.full((2, 1), level)):
        given, asked = (
            MODEL.generate(prompt_of(seed), 7, generator=generator(seed), **options, **each)
            for each in ({"levels": levels}, {"timestep_head": FixedTimestep(level)})
        )
        assert torch.equal(given.tokens, asked.tokens)
        assert torch.equal(given.levels, asked.levels)
        assert given.nfe == asked.nfe


@given(
    seed=st.integers(0, 10**6),
    first=st.sampled_from([0.0, 1.0]),
    window=st.sampled_from([1, 3, 8]),
    stride=st.sampled_from([1, 2]),
)
def test_every_token_has_the_level_it_is_given(seed, first, window, stride):
    drawn = torch.rand(3, 8, dtype=torch.float64, generator=generator(seed))
    levels = torch.where(drawn < 0.3, 0.0, torch.where(drawn > 0.7, 1.0, drawn))
    levels[:, :3] = first  # a whole window at either end is written in a way of its own
    options = {"max_steps": 3, "window": window, "stride": min(stride, window), "stop": 5}
    prompt, most = prompt_of(seed, 3), [8, 3, 6]
    seeds = [generator(seed + row) for row in range(3)]
    whole = MODEL.generate(prompt, most, levels=levels, generator=seeds, **options)
    for row, length in enumerate(whole.lengths.tolist()):
        wanted = torch.where(
            (step_counts(levels[row], 3) >= 1) & (levels[row] > MODEL.schedule.t_min), levels[row], 0.0
        )
        assert torch.equal(whole.levels[row, :length], wanted[:length])
        given, single = levels[row : row + 1, : most[row]], generator(seed + row)
        alone = MODEL.generate(prompt[row : row + 1], most[row], levels=given, generator=single, **options)
        assert torch.equal(alone.tokens[0, :length], whole.tokens[row, :length])


def test_levels_that_cannot_be_served():
    for options, said in (
        ({"levels": 1.5}, "got 1.5"),
        ({"levels": torch.zeros(7)}, r"of shape \(2, 7\), \(2, 1\).* or \(1, 7\).*, got torch.float32 \(7,\)"),
        ({"levels": torch.full((1, 7), torch.nan)}, "got nan"),
        (
            {"levels": 0, "timestep_head": FixedTimestep(0)},
            "levels are given, and so is a timestep_head, FixedTimestep",
        ),
        ({"levels": torch.tensor([[0.0], [0.5]]), "speculation": Speculation()}, "levels are above 0, and speculation"),
    ):
        with pytest.raises(ValueError, match=said):
            MODEL.generate(prompt_of(0), 7, **options)
    quick = MODEL.generate(prompt_of(0), 7, levels=0, speculation=Speculation(), generator=generator(0))
    assert torch.equal(quick.tokens, MODEL.generate(prompt_of(0), 7, levels=0, generator=generator(0)).tokens)


def test_levels_below_one_step_are_final():
    out = MODEL.generate(prompt_of(0), 5, timestep_head=FixedTimestep(0.24), max_steps=4, generator=generator(0))
    assert (out.levels == 0).all()
    assert out.nfe == 0
    out = MODEL.generate(prompt_of(0), 5, timestep_head=FixedTimestep(0.25), max_steps=4, generator=generator(0))
    assert (out.levels == 0.25).all()
    assert out.nfe == 1


@pytest.mark.parametrize("level", [0.05, 0.08, 0.1])
def test_levels_of_a_step_or_more_are_final_where_the_schedule_says_so(level):
    """Such a level is worth a step of 20, and is a realised word all the same: it lies at or below t_min."""
    out = MODEL.generate(prompt_of(0), 5, timestep_head=FixedTimestep(level), max_steps=20, generator=generator(0))
    assert (out.levels == 0).all()
    assert out.nfe == 0


@pytest.mark.parametrize("plan", [early_stop, late_start, full, by_order(torch.linspace(0, 1, 6), 0.5)], ids=str)
def test_no_plan_goes_below_the_lower_end_of_the_schedule(plan):
    model = random_model()
    model.schedule = Cosine(t_min=0.3)
    out = model.generate(
        prompt_of(0), 6, plan=plan, timestep_head=FixedTimestep(0.87), generator=generator(0), trajectory=True
    )
    (steps,) = out.trajectory
    assert (out.levels == 0.87).all()
    assert ((steps.levels == 0) | (steps.levels >= 0.3)).all()
    elsewhere = plan(out.levels, 20, 0.1)
    assert ((elsewhere > 0) & (elsewhere < 0.3)).any()
