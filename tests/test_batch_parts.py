"""A batch of a step in parts: whatever the cut, losses, gradients and what was found add up to those of the whole."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo import Evo, Objective
from evo.core import ClockDensity, Exploration, Extremes, Output, Part
from evo.core.chance import Chance
from tests.conftest import generator, random_model

N = 7
NETWORKS = {estimated: random_model(self_conditioning=estimated).train() for estimated in (False, True)}
with torch.no_grad():
    NETWORKS[True].backbone.estimate_embed.weight.normal_(std=0.5)

seeds = st.integers(0, 10**6)
shares = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])


@st.composite
def cuts(draw: st.DrawFn) -> list[list[int]]:
    """The rows of a batch dealt out to parts, in any order."""
    total = draw(st.integers(1, 8))
    rows = draw(st.permutations(range(total)))
    edges = [0, *sorted(draw(st.sets(st.integers(1, total - 1), max_size=3)) if total > 1 else ()), total]
    return [rows[begin:end] for begin, end in pairwise(edges)]


@st.composite
def objectives(draw: st.DrawFn) -> Objective:
    """Objectives in which every term counts, and that have learned something."""
    clock, extremes = ClockDensity(), Extremes(doubt=0.0)
    clock.update(torch.rand(clock.figures, generator=generator(0), dtype=torch.float64))
    for head in (9.0, 11.0):
        extremes.update(torch.tensor([40 * head, 40, 30, 20, 20, 10], dtype=torch.float64))
    return Objective(
        causal_weight=draw(st.sampled_from([0.0, 0.7])),
        level_price=0.4,
        entropy_weight=0.2,
        trials=draw(st.sampled_from([0.0, 0.6])),
        self_conditioning=draw(shares),
        exploration=Exploration(share=draw(shares), noise=0.5),
        clock=clock if draw(st.booleans()) else None,
        extremes=extremes if draw(st.booleans()) else None,
    )


class Step:
    """Sequences of different windows, of which some tokens are scored, and what may be asked of them."""

    def __init__(self, total: int, seed: int) -> None:
        draws = generator(seed)
        self.seed = seed
        self.tokens = torch.randint(0, 7, (total, N), generator=draws)
        self.prompt = torch.randint(0, N - 2, (total,), generator=draws)
        self.lengths = torch.randint(N - 2, N + 1, (total,), generator=draws)
        self.mask = torch.rand(total, N, generator=draws) < 0.7
        self.scored = (self.mask & (torch.arange(N) < self.lengths[:, None])).sum()

    def run(self, model: Evo, rows: list[int], objective: Objective, *, number: bool = True, **options) -> Output:
        """One part of the step."""
        part = Part(
            rows=rows,
            total=len(self.tokens),
            scored=int(self.scored) if number else self.scored,
            common=generator(self.seed),
        )
        return model(
            self.tokens[rows],
            self.mask[rows],
            prompt_length=self.prompt[rows],
            lengths=self.lengths[rows],
            generator=[generator(self.seed + 1 + row) for row in rows],
            objective=objective,
            part=part,
            **options,
        )


def gradients(model: Evo, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


@given(
    cut=cuts(),
    seed=seeds,
    objective=objectives(),
    estimated=st.booleans(),
    level=st.sampled_from([None, None, 0.0, 0.6]),
    number=st.booleans(),
)
def test_parts_add_up_to_the_whole(cut, seed, objective, estimated, level, number):
    model, total = NETWORKS[estimated], sum(map(len, cut))
    step = Step(total, seed)
    whole = step.run(model, list(range(total)), objective, levels=level)
    parts = [step.run(model, rows, objective, levels=level, number=number) for rows in cut]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=0, atol=1e-10)

    expected, found = gradients(model, whole.loss), {}
    for part in parts:
        each = gradients(model, part.loss)
        assert each.keys() == expected.keys(), "every part, and so every rank, has gradients of the same parameters"
        found = {name: found.get(name, 0) + grad for name, grad in each.items()}
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    for name in ("levels", "sketch_bits", "flow_bits", "reconstruction"):
        together = torch.empty_like(whole.levels)
        for rows, part in zip(cut, parts, strict=True):
            together[rows] = getattr(part, name)
        torch.testing.assert_close(together, getattr(whole, name), rtol=1e-11, atol=1e-11)

    if objective.clock is None and objective.extremes is None:
        assert whole.observed is None
        assert all(part.observed is None for part in parts)
    else:
        observed = sum(part.observed for part in parts)
        assert not observed.requires_grad
        torch.testing.assert_close(observed, whole.observed, rtol=1e-10, atol=1e-10)


@given(seed=seeds, objective=objectives())
def test_a_batch_without_a_part_is_a_whole_one(seed, objective):
    """Also with no part to say how much is scored, the loss is that of the only part."""
    step, model = Step(5, seed), NETWORKS[True]
    part = step.run(model, list(range(5)), objective)
    torch.manual_seed(seed)
    common = torch.default_generator.get_state()
    options = {"prompt_length": step.prompt, "lengths": step.lengths, "objective": objective}
    alone = model(step.tokens, step.mask, generator=[generator(seed + 1 + row) for row in range(5)], **options)
    assert not torch.equal(torch.default_generator.get_state(), common), "what all share comes from torch's own"
    torch.testing.assert_close(alone.loss, part.loss, rtol=0, atol=1e-12)


@given(seed=seeds, objective=objectives())
def test_a_step_changes_what_has_been_learned_only_when_told(seed, objective):
    step = Step(6, seed)
    learned = [each for each in (objective.clock, objective.extremes) if each is not None]
    before = [buffer.clone() for each in learned for buffer in each.buffers()]
    out = step.run(NETWORKS[False], list(range(6)), objective)
    assert all(map(torch.equal, before, (buffer for each in learned for buffer in each.buffers())))
    objective.observe(out.observed)
    after = [buffer for each in learned for buffer in each.buffers()]
    assert not any(map(torch.equal, before, after))
    if objective.clock is not None:
        seen = objective.clock.counts - objective.clock.decay * before[1]
        assert seen.sum().item() == pytest.approx(6), "one value of the clock a sequence"


def test_what_was_observed_under_another_objective_is_refused():
    learning = Objective(clock=ClockDensity(), extremes=Extremes())
    for observed in (None, torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"this objective learns from \(70,\) figures"):
            learning.observe(observed)
    with pytest.raises(ValueError, match=r"observed has \(70,\).*from \(0,\)"):
        Objective().observe(torch.zeros(70, dtype=torch.float64))
    Objective().observe(None)


@given(total=st.integers(1, 64), share=st.floats(0, 1), estimated=st.floats(0, 1))
def test_shares_are_spread_evenly_and_kinds_are_estimated_alike(total, share, estimated):
    whole = Part(rows=range(total), total=total, scored=1)
    kinds = whole.kinds(share)
    assert len(kinds.explorers.places) == kinds.explorers.whole == math.floor(total * share)
    assert sorted([*kinds.explorers.places, *kinds.learners.places]) == list(range(total))
    for kind in kinds[:2]:
        assert [kinds.ranks[place] for place in kind.places] == list(range(kind.whole))
    for begin in range(total):
        inside = sum(begin <= place < begin + 5 for place in kinds.explorers.places)
        assert abs(inside - share * min(5, total - begin)) < 1, "any run of rows has its share"
    some = whole.some(estimated, kinds)
    assert len(some.places) == some.whole
    for kind in kinds[:2]:
        assert len({*kind.places} & {*some.places}) == math.floor(kind.whole * estimated)


@given(seed=seeds, cut=cuts())
def test_clock_values_cover_the_clock_whatever_the_cut(seed, cut):
    like, total = torch.zeros((), dtype=torch.float64), sum(map(len, cut))
    values = []
    for rows in cut:
        part = Part(rows=rows, total=total, scored=1, common=generator(seed))
        shared = Chance(None, len(rows), part.common).shared(like)
        values.append((part.strata(like) + shared) % 1)
    clock = torch.cat(values).sort().values
    gaps = torch.cat([clock[1:] - clock[:-1], clock[:1] + 1 - clock[-1:]])
    torch.testing.assert_close(gaps, torch.full((total,), 1 / total, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sequence_draws_the_same_numbers_in_whatever_batch_it_sits(dtype):
    like, found = torch.zeros((), dtype=dtype), []
    for rows in ([3], [0, 3], [4, 3, 2, 1]):
        chance, place = Chance([generator(row) for row in rows], len(rows)), rows.index(3)
        drawn = (chance.normal(N, 5, like=like), chance.uniform(like=like), chance.uniform(N, like=like))
        found.append([each[place] for each in drawn])
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


@given(seed=seeds, levels=st.sampled_from([None, 0.7]))
def test_in_evaluation_parts_add_up_too(seed, levels):
    step, model = Step(5, seed), random_model()
    whole, *parts = (step.run(model, rows, Objective(), levels=levels) for rows in ([0, 1, 2, 3, 4], [3, 1], [0, 2, 4]))
    assert whole.observed is None
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=0, atol=1e-10)


def test_parts_that_cannot_be_are_refused():
    model, tokens = NETWORKS[False], torch.zeros(2, N, dtype=torch.int64)
    for rows in ([0], [0, 0], [-1, 0], [0, 4]):
        with pytest.raises(ValueError, match="2 sequences need as many different rows"):
            model(tokens, part=Part(rows=rows, total=4, scored=8))
    for scored in (-1, torch.ones(2)):
        with pytest.raises(ValueError, match="how many tokens the whole batch scores"):
            model(tokens, part=Part(rows=range(2), total=4, scored=scored))
    with pytest.raises(ValueError, match="generator has 3 of them; 2 sequences need one for all, or 2"):
        model(tokens, generator=[generator(row) for row in range(3)])
