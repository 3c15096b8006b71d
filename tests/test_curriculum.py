"""What a step of training is asked, as a function of the step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.core import ClockDensity, Extremes
from evo.training import CurriculumConfig
from evo.training.curriculum import objective, windows
from evo.training.seeds import Purpose, derive

steps = st.integers(0, 500)


@given(
    seed=steps,
    step=steps,
    count=st.integers(1, 40),
    length=st.integers(2, 50),
    share=st.floats(0, 1),
    suffix=st.floats(0, 1),
)
def test_windows_have_at_least_one_token(seed, step, count, length, share, suffix):
    asked = share, suffix * (1 - share), seed, step, count, length
    prompts, ends, suffixes = windows(*asked)
    whole = (prompts == 0) & (ends == length) & (suffixes == 0)
    behind_a_prompt = (prompts >= 1) & (prompts < ends) & (ends <= length) & (suffixes == 0)
    between = (prompts >= 0) & (prompts < length - suffixes) & (suffixes >= 1) & (ends == length)
    assert (behind_a_prompt | between | whole).all()
    assert all(torch.equal(a, b) for a, b in zip(windows(*asked), (prompts, ends, suffixes), strict=True))


def test_windows_fill_their_share_and_every_place():
    prompts, ends, suffixes = windows(0.25, 0.25, 0, 0, 40_000, 5)
    chosen, between = (prompts > 0) & (suffixes == 0), suffixes > 0
    for share in (chosen, between):
        assert abs(int(share.sum()) - 10_000) < 5 * (40_000 * 0.25 * 0.75) ** 0.5
    pairs = {(int(p), int(e)) for p, e in zip(prompts[chosen], ends[chosen], strict=True)}
    assert pairs == {(p, e) for p in range(1, 5) for e in range(p + 1, 6)}
    pairs = {(int(p), int(s)) for p, s in zip(prompts[between], suffixes[between], strict=True)}
    assert pairs == {(p, s) for p in range(4) for s in range(1, 5 - p)}
    assert not any((each > 0).any() for each in windows(0.0, 0.0, 0, 0, 100, 5)[::2])
    assert (windows(1.0, 0.0, 0, 0, 100, 5)[0] > 0).all()
    assert (windows(0.0, 1.0, 0, 0, 100, 5)[2] > 0).all()


def test_the_objective_anneals():
    config = CurriculumConfig(
        auxiliary=0.8,
        auxiliary_floor=0.2,
        auxiliary_share=0.5,
        level_noise=2.0,
        level_noise_floor=1.0,
        explore=0.3,
        explore_floor=0.1,
        explore_alone=0.4,
    )
    asked = [objective(config, step, 101) for step in range(101)]
    assert asked[0].aux_weight == pytest.approx(0.8)
    assert asked[25].aux_weight == pytest.approx(0.5)
    assert [one.aux_weight for one in asked[50:]] == pytest.approx([0.2] * 51)
    assert [asked[k].exploration.noise for k in (0, 50, 100)] == pytest.approx([2.0, 1.5, 1.0])
    assert [one.exploration.share for one in asked[:40]] == [1.0] * 40
    assert [asked[k].exploration.share for k in (40, 50, 100)] == pytest.approx([0.22, 0.2, 0.1])
    assert objective(CurriculumConfig(auxiliary_share=0.0, auxiliary_floor=0.5), 0, 10).aux_weight == 0.5
    given = objective(CurriculumConfig(flow=0.3, teaching=0.7), 0, 10)
    assert (given.flow_weight, given.teaching) == (0.3, 0.7)


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_lends_what_it_has_found_to_the_objective_that_asks_for_it(asked):
    clock, extremes = ClockDensity(), Extremes()
    given = objective(CurriculumConfig(importance=asked, compare_ends=asked), 0, 10, clock, extremes)
    assert (given.clock, given.extremes) == ((clock, extremes) if asked else (None, None))


@given(a=st.tuples(steps, st.sampled_from(Purpose), steps), b=st.tuples(steps, st.sampled_from(Purpose), steps))
def test_seeds_differ_exactly_where_their_arguments_do(a, b):
    assert (derive(*a) == derive(*b)) == (a == b)
