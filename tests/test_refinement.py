"""Refinement of a window: gathered is dense, frozen is frozen, what is not needed is not computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo import Evo
from evo.core.cache import Cache
from evo.core.masks import Causal
from evo.core.packing import Packing
from evo.core.refinement import refine
from evo.heads import LinearDecoder, NucleusPrior
from evo.schedules import by_order, early_stop, full, late_start, step_counts
from evo.solvers import Euler, Exponential, ExponentialMultistep, Heun, TorchDiffEq
from tests.conftest import random_model
from tests.refinement_cases import Case, Watched, dense

MODEL = random_model()
SINGLE = random_model(dtype=torch.float32)
V = MODEL.latent_space.vocab_size
ORDER = by_order(torch.tensor([0.0, 0.3, 0.3, 1.0, 0.6, 0.2]), 0.4)
PLANS = st.sampled_from([early_stop, late_start, full, ORDER])
SEEDS = st.integers(0, 10**6)


def solvers(model: Evo) -> dict[str, object]:
    schedule = model.schedule
    return {
        "euler": Euler(),
        "heun": Heun(),
        "exponential": Exponential(schedule=schedule),
        "multistep": ExponentialMultistep(schedule=schedule),
    }


SOLVERS = st.sampled_from(sorted(solvers(MODEL)))


def as_alone(case: Case, row: int, plan: object) -> tuple[Case, object]:
    """One sequence without padding, and the plan for as many tokens as it has."""
    alone = case.alone(row)
    size = alone.sketch.tokens.shape[1]
    return alone, by_order(ORDER.order[:size], ORDER.width) if plan is ORDER else plan


def assert_dense(model: Evo, case: Case, solver: str, plan: object, rtol: float, atol: float, **options: object) -> int:
    """Every sequence of the batch is what the dense computation makes of it alone; returns how many tokens were decoded."""
    decoder = Watched()
    its_options = {name: value for name, value in options.items() if name != "refresh"}
    tokens, _, _ = case.refined(model, solver=solvers(model)[solver], plan=plan, decoder=decoder, **options)
    for row in range(len(tokens)):
        alone, its_plan = as_alone(case, row, plan)
        size = alone.sketch.tokens.shape[1]
        expected = dense(model, alone, solvers(model)[solver], its_plan, **its_options)
        if decoder.seen and size:
            found = decoder.of(case.sketch.uniform[row, :size])
            torch.testing.assert_close(found, expected.log_probs, rtol=rtol, atol=atol)
        assert torch.equal(tokens[row, :size], expected.tokens)
    return len(decoder.seen)


@given(seed=SEEDS, plan=PLANS, solver=SOLVERS, ragged=st.booleans())
def test_gathered_is_dense(seed, plan, solver, ragged):
    assert_dense(MODEL, Case.draw(MODEL, seed, ragged=ragged), solver, plan, 1e-12, 1e-12)


@given(seed=SEEDS, plan=PLANS, ragged=st.booleans())
def test_gathered_is_dense_in_single_precision(seed, plan, ragged):
    """Of one row: through a flow a rounding grows, and which kernel rounds how depends on the number of rows."""
    case = Case.draw(SINGLE, seed, ragged=ragged, max_steps=1)
    assert_dense(SINGLE, case, "euler", plan, 1e-6, 1e-6, max_steps=1)


@pytest.mark.parametrize(
    "overrides",
    [
        {"self_conditioning": True},
        {"bos": "detached"},
        {"kv_heads": 2},
        {"vocab_size": 29},
    ],
    ids=str,
)
def test_gathered_is_dense_for_other_models(overrides):
    model = random_model(**overrides)
    if model.backbone.estimate_embed is not None:
        torch.nn.init.normal_(model.backbone.estimate_embed.weight, std=0.5)
    decoded = sum(
        assert_dense(model, Case.draw(model, seed), solver, plan, 1e-12, 1e-12)
        for seed in range(4)
        for plan in (early_stop, late_start)
        for solver in ("euler", "heun")
    )
    assert decoded > 50


@given(seed=SEEDS, plan=PLANS, refresh=st.integers(1, 5))
def test_no_sequence_depends_on_its_batch(seed, plan, refresh):
    """Also not with a decoder that draws, nor between refreshes."""
    case = Case.draw(MODEL, seed)
    options = {"decoder": LinearDecoder(prior=NucleusPrior(top_p=1.0, temperature=1.0)), "refresh": refresh}
    tokens, _, steps = case.refined(MODEL, plan=plan, **options)
    for row in range(len(tokens)):
        alone, its_plan = as_alone(case, row, plan)
        size = alone.sketch.tokens.shape[1]
        its_tokens, _, its_steps = alone.refined(MODEL, plan=its_plan, **options)
        assert torch.equal(its_tokens[0], tokens[row, :size])
        assert torch.equal(its_steps.tokens[0], steps.tokens[row, :, :size])


# Reusing keys and values.


@given(seed=SEEDS, refresh=st.integers(2, 5), solver=SOLVERS)
def test_reuse_is_exact_where_every_token_moves_in_every_step(seed, refresh, solver):
    levels = 0.2 + 0.8 * torch.rand(3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    case = Case.draw(MODEL, seed, ragged=False, levels=levels)
    assert assert_dense(MODEL, case, solver, full, 1e-12, 1e-12, refresh=refresh) == levels.numel()


SHALLOW = random_model(depth=1)


@given(seed=SEEDS, refresh=st.integers(2, 5), plan=PLANS, solver=st.sampled_from(["euler", "exponential"]))
def test_reuse_is_exact_in_one_layer(seed, refresh, plan, solver):
    """There the keys and values of a token are its own affair: they are right unless a token that was committed is not looked at again."""
    assert_dense(SHALLOW, Case.draw(SHALLOW, seed), solver, plan, 1e-12, 1e-12, refresh=refresh)


def test_reuse_deviates_and_stays_finite():
    """In two layers it is an approximation; every step is fresh with refresh=1, and only the first with refresh=5."""
    deviation = {}
    for refresh in (1, 2, 5):
        found = []
        for seed in range(8):
            case = Case.draw(MODEL, seed)
            exact, reused = Watched(), Watched()
            case.refined(MODEL, decoder=exact)
            case.refined(MODEL, decoder=reused, refresh=refresh)
            assert exact.seen.keys() == reused.seen.keys()
            found += [(exact.seen[token].exp() - reused.seen[token].exp()).abs().max() for token in exact.seen]
        deviation[refresh] = torch.stack(found)
        assert deviation[refresh].isfinite().all()
    assert (deviation[1] == 0).all()
    assert 0 < deviation[5].mean() < 0.2
    assert deviation[2].mean() < deviation[5].mean()


# What it costs.


@contextmanager
def counted(model: Evo) -> Iterator[dict[str, int]]:
    """Rows that pass through the blocks, and through the readout."""
    seen = {"computed": 0, "read": 0}

    def computed(_: object, given: tuple[torch.Tensor, ...]) -> None:
        seen["computed"] += given[0].shape[:2].numel()

    def read(_: object, given: tuple[torch.Tensor, ...]) -> None:
        seen["read"] += given[0].shape[:2].numel()

    hooks = (
        model.backbone.blocks[0].register_forward_pre_hook(computed),
        model.readout.register_forward_pre_hook(read),
    )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@given(seed=SEEDS, plan=PLANS, refresh=st.integers(1, 6), ragged=st.booleans())
def test_cost_is_what_the_plan_says(seed, plan, refresh, ragged):
    case = Case.draw(MODEL, seed, ragged=ragged)
    sketch, request = case.sketch, case.request(plan=plan, refresh=refresh)
    state = case.state(MODEL)
    with counted(MODEL) as seen, torch.no_grad():
        _, nfe, _ = refine(state, sketch, request)
    rows = plan(sketch.levels, 5, MODEL.schedule.t_min)
    moves = rows[:, 1:] != rows[:, :-1]
    present = [6] * 3 if sketch.length is None else sketch.length.tolist()
    computed = 0
    for sequence in range(3):
        done, committed = 0, 0
        for row in range(5):
            live = int(moves[sequence, row].sum())
            if not live:
                continue
            computed += present[sequence] if done % refresh == 0 else live + committed
            done, committed = done + 1, int((moves[sequence, row] & (rows[sequence, row + 1] == 0)).sum())
    assert seen == {"computed": computed, "read": int(moves.sum())}
    assert nfe == int(moves.any(2).any(0).sum())
    if plan in (early_stop, late_start):
        assert seen["read"] == step_counts(sketch.levels, 5).sum()


def test_prompts_are_read_once_and_left_alone():
    case = Case.draw(MODEL, 3)
    with torch.no_grad():
        for refresh in (1, 3):
            state = case.state(MODEL)
            lengths, before = state.cache.lengths, [[x.clone() for x in state.cache.read(layer)] for layer in range(2)]
            held = torch.arange(state.cache.length) < state.cache.lengths[:, None]
            refine(state, case.sketch, case.request(refresh=refresh))
            assert torch.equal(state.cache.lengths, lengths)
            for layer in range(2):
                for old, new in zip(before[layer], state.cache.read(layer), strict=True):
                    assert torch.equal(old.transpose(1, 2)[held], new.transpose(1, 2)[held])


# Stopping early.


@given(seed=SEEDS, plan=PLANS, fidelity=st.sampled_from([0.3, 0.5, 0.8, 0.95]), solver=SOLVERS)
def test_a_settled_token_is_committed_at_once(seed, plan, fidelity, solver):
    assert_dense(MODEL, Case.draw(MODEL, seed), solver, plan, 1e-12, 1e-12, fidelity=fidelity)


def test_the_lowest_fidelity_is_one_step_and_the_highest_is_all_of_them():
    case = Case.draw(MODEL, 5, ragged=False, levels=torch.full((3, 6), 0.9, dtype=torch.float64))
    _, nfe, steps = case.refined(MODEL, fidelity=1e-6)
    assert nfe == 1
    assert (steps.levels[:, 1:] == 0).all()
    _, nfe, steps = case.refined(MODEL, fidelity=0.9)
    early = (steps.levels > 0).sum(1)
    assert 1 < nfe <= 4
    assert (early < 4).any()
    plain, count, whole = case.refined(MODEL)
    assert count == 4
    assert ((whole.levels > 0).sum(1) == 4).all()
    never, count, all_of_them = case.refined(MODEL, fidelity=1.0)
    assert count == 4
    assert torch.equal(never, plain)
    assert torch.equal(all_of_them.levels, whole.levels)


def test_early_stopping_saves_rows():
    case = Case.draw(MODEL, 5, ragged=False, levels=torch.full((3, 6), 0.9, dtype=torch.float64))
    cost = []
    for fidelity in (None, 0.8):
        with counted(MODEL) as seen:
            _, _, steps = case.refined(MODEL, fidelity=fidelity, refresh=5)
        assert (steps.levels[:, :-1] > 0).sum() == seen["read"]
        cost.append(seen["computed"])
    assert cost[1] < cost[0]


# What goes wrong.


@pytest.mark.parametrize("refresh", [1, 3])
def test_nan_weights_fail_clearly_and_leave_the_model_usable(refresh):
    model = random_model()
    case = Case.draw(model, 0, ragged=False)
    before, _, _ = case.refined(model, refresh=refresh)
    weight = model.backbone.blocks[1].feed_forward.down.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite latents while refining"):
        case.refined(model, refresh=refresh)
    with torch.no_grad():
        weight.copy_(kept)
    after, _, _ = case.refined(model, refresh=refresh)
    assert torch.equal(before, after)


def test_settings_out_of_range_are_refused():
    case = Case.draw(MODEL, 0)
    for refresh in (0, -1):
        with pytest.raises(ValueError, match=f"refresh is {refresh}"):
            case.request(refresh=refresh)
    for fidelity in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"fidelity is {fidelity}"):
            case.request(fidelity=fidelity)


def test_a_packed_pass_says_what_it_needs():
    packing = Packing(
        batch=1,
        rows=None,
        sequence=torch.zeros(2, dtype=torch.int64),
        slots=torch.arange(2),
        queries=None,
        count=2,
        ends=(2,),
    )
    latents, level = torch.zeros(1, 2, MODEL.latent_space.dim).double(), torch.zeros(1, 2).double()
    with pytest.raises(ValueError, match="need a cache"):
        MODEL.backbone(latents, level, packing=packing)
    with pytest.raises(ValueError, match="neither mask nor store"):
        MODEL.backbone(latents, level, packing=packing, cache=Cache(4), mask=Causal())
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        MODEL.backbone(latents.requires_grad_(), level, packing=packing, cache=Cache(4))


def test_an_adaptive_solver_solves_each_row_for_what_moves():
    case = Case.draw(MODEL, 4)
    adaptive = TorchDiffEq("dopri5", rtol=1e-8, atol=1e-8)
    tokens, nfe, _ = case.refined(MODEL, solver=adaptive)
    fine, _, _ = case.refined(MODEL, solver=Heun())
    assert nfe > 5
    assert tokens.shape == fine.shape
    frozen = case.sketch.levels == 0
    assert torch.equal(tokens[frozen], case.sketch.tokens[frozen])
