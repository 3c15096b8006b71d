"""Paths and plans: one ramp, two uses; K_i steps exactly (K-1), monotone plans that start at t and end at 0 (K-2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evo.schedules import Path, by_order, check_rows, early_stop, full, late_start, step_counts

F64 = torch.float64
T_MIN = 0.1


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype | None = None) -> tuple[Tensor, int]:
    """Levels (B, N), points of the grid, t_min, the ends and rounding's neighbours among them, and K."""
    max_steps = draw(st.sampled_from([1, 2, 7, 20, 100, 1000]))
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    value = st.one_of(
        st.floats(0, 1),
        st.integers(0, max_steps).map(lambda k: k / max_steps),
        st.sampled_from([0.0, T_MIN, T_MIN / 2, 1e-7, 1 - 1e-7, 1.0]),
    )
    values = draw(st.lists(value, min_size=batch * tokens, max_size=batch * tokens))
    dtype = draw(st.sampled_from([torch.float32, F64])) if dtype is None else dtype
    return torch.tensor(values, dtype=dtype).view(batch, tokens), max_steps


@st.composite
def paths(draw: st.DrawFn, batch: int, tokens: int) -> Path:
    """Any path for levels of that shape."""
    shape = draw(st.sampled_from([(tokens,), (batch, tokens)]))
    turns = draw(st.lists(st.floats(0, 1), min_size=math.prod(shape), max_size=math.prod(shape)))
    ordered = by_order(torch.tensor(turns, dtype=F64).view(shape), draw(st.floats(1e-3, 1)))
    return draw(st.sampled_from([early_stop, late_start, full, ordered]))


def own_steps(path: Path, plan: Tensor, levels: Tensor) -> Tensor:
    """(B, K, N): whether step k is one of the token's own, as the plan's docstring defines it."""
    wait, _ = path.span(levels.unsqueeze(1), plan.shape[1] - 1)
    row = torch.arange(plan.shape[1] - 1).view(1, -1, 1)
    return (plan[:, :-1] > 0) & (row >= wait)


# Step counts


@given(st.integers(1, 3000), st.data())
def test_grid_levels_count_as_on_the_grid(max_steps: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, max_steps))
    for dtype in (torch.float32, F64):
        level = torch.tensor([k / max_steps], dtype=dtype)
        assert step_counts(level, max_steps).item() == k
        # A hundredth of a step below is below, as far as the dtype can tell.
        below = level - 0.01 / max_steps
        if k > 0 and 0.01 / max_steps > 4 * torch.finfo(dtype).eps:
            assert step_counts(below, max_steps).item() == k - 1


@given(batches(F64))
def test_step_counts_are_the_floor(case: tuple[Tensor, int]) -> None:
    levels, max_steps = case
    wanted = (max_steps * levels + 1e-6).floor().long()
    assert torch.equal(step_counts(levels, max_steps), wanted)
    assert step_counts(levels, max_steps).dtype == torch.int64


# Plans


@given(batches(), st.data())
def test_plans_fall_from_t_to_0(case: tuple[Tensor, int], data: st.DataObject) -> None:
    levels, max_steps = case
    path = data.draw(paths(*levels.shape))
    plan = path(levels, max_steps)
    assert plan.shape == (levels.shape[0], max_steps + 1, levels.shape[1])
    assert plan.dtype == levels.dtype
    start = torch.where(step_counts(levels, max_steps) > 0, levels, 0)
    assert torch.equal(plan[:, 0], start)
    assert (plan[:, -1] == 0).all()
    assert (plan.diff(dim=1) <= 0).all()
    live = plan > 0
    assert (plan[live] >= start.clamp(max=T_MIN).unsqueeze(1).expand_as(plan)[live]).all()


@pytest.mark.parametrize("path", [early_stop, late_start])
@given(case=batches())
def test_exactly_k_i_steps(path: Path, case: tuple[Tensor, int]) -> None:
    levels, max_steps = case
    plan = path(levels, max_steps)
    own = own_steps(path, plan, levels)
    counts = step_counts(levels, max_steps)
    assert torch.equal(own.sum(1), counts)
    # One after the other; before them the token waits at t, after them it is 0.
    moved = plan[:, :-1] != plan[:, 1:]
    assert not (moved & ~own).any()
    if path is early_stop:
        assert torch.equal(own[:, 0], counts > 0)
        assert torch.equal(own, plan[:, :-1] > 0)
    else:
        assert torch.equal(own[:, -1], counts > 0)
    # Away from t_min and but for one step, which takes the remainder, steps are 1/K.
    remainder = 1 if path is early_stop else 0
    steps = plan[:, :-1] - plan[:, 1:]
    inner = own & (plan[:, 1:] > T_MIN + 1e-6)
    if not remainder:
        inner[:, 1:] &= own[:, :-1]
        inner[:, 0] = False
    torch.testing.assert_close(steps[inner], torch.full_like(steps[inner], 1 / max_steps), rtol=0, atol=2e-6)


@given(batches())
def test_full_takes_every_step_evenly(case: tuple[Tensor, int]) -> None:
    levels, max_steps = case
    plan = full(levels, max_steps)
    own = own_steps(full, plan, levels)
    assert torch.equal(own.all(1), step_counts(levels, max_steps) > 0)
    steps = plan[:, :-1] - plan[:, 1:]
    length = torch.where(own.all(1), (levels - T_MIN).clamp(min=0), 0) / max_steps
    torch.testing.assert_close(steps[:, :-1], length.unsqueeze(1).expand(-1, max_steps - 1, -1), rtol=0, atol=3e-6)


@pytest.mark.parametrize("path", [early_stop, late_start, full], ids=str)
@given(st.integers(1, 20).map(lambda tenth: 10 * tenth), st.data())
def test_rounding_is_no_step(path: Path, max_steps: int, data: st.DataObject) -> None:
    """Where t_min is a point of the grid, a token moves in float32 in the rows in which it moves in float64."""
    counts = data.draw(st.lists(st.integers(0, max_steps), min_size=1, max_size=5))
    levels = torch.tensor([counts], dtype=F64) / max_steps
    exact, rounded = (path(given, max_steps).diff(dim=1) != 0 for given in (levels, levels.float()))
    assert torch.equal(rounded, exact)


def test_early_stop_in_figures() -> None:
    plan = early_stop(torch.tensor([[0.04, 0.1, 0.26, 0.5, 1.0]]), 5)
    wanted = [
        [0.0, 0.0, 0.26, 0.5, 1.0],
        [0.0, 0.0, 0.0, 0.3, 0.8],
        [0.0, 0.0, 0.0, 0.0, 0.6],
        [0.0, 0.0, 0.0, 0.0, 0.4],
        [0.0, 0.0, 0.0, 0.0, 0.2],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ]
    torch.testing.assert_close(plan[0], torch.tensor(wanted))


def test_late_start_in_figures() -> None:
    plan = late_start(torch.tensor([[0.04, 0.26, 0.5, 1.0]]), 4)
    wanted = [[0.0, 0.26, 0.5, 1.0], [0.0, 0.26, 0.5, 0.75], [0.0, 0.26, 0.5, 0.5], [0.0, 0.26, 0.25, 0.25], [0.0] * 4]
    torch.testing.assert_close(plan[0], torch.tensor(wanted))


def test_t_min_of_the_schedule_is_kept_to() -> None:
    levels = torch.tensor([[0.05, 1.0]])
    torch.testing.assert_close(early_stop(levels, 20, t_min=0.01)[0, -3:, 1], torch.tensor([0.1, 0.05, 0.0]))
    torch.testing.assert_close(early_stop(levels, 20)[0, -4:, 1], torch.tensor([0.15, 0.1, 0.1, 0.0]))
    torch.testing.assert_close(full(levels, 2, t_min=0.5)[0, :, 1], torch.tensor([1.0, 0.75, 0.0]))


def test_limits_of_by_order() -> None:
    levels = torch.ones(1, 4)
    # In turn, one token after the other: autoregression.
    narrow = by_order(torch.linspace(0, 1, 4), 0.25)(levels, 4)
    assert narrow[0].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    # All at once: the plan of `early_stop` for tokens at level 1.
    assert torch.equal(by_order(torch.rand(4), 1.0)(levels, 10), early_stop(levels, 10))
    # Blocks: one is clean before the next begins.
    blocks = by_order(torch.tensor([0.0, 0.0, 1.0, 1.0]), 0.5)(levels, 10)
    assert (blocks[0, 5, :2] == 0).all()
    assert (blocks[0, :6, 2:] == 1).all()


# Paths


@given(batches(F64), st.data(), st.floats(0, 1), st.floats(0, 1))
def test_paths_fall_from_t_to_t_min(case: tuple[Tensor, int], data: st.DataObject, one: float, other: float) -> None:
    levels, _ = case
    path = data.draw(paths(*levels.shape))
    floor = levels.clamp(max=T_MIN)
    (early, _), (late, _) = (path.at(levels, torch.full((len(levels),), c, dtype=F64)) for c in sorted((one, other)))
    assert ((late >= floor) & (late <= early) & (early <= levels)).all()
    start, _ = path.at(levels, torch.zeros(len(levels), 1, dtype=F64))
    end, speed = path.at(levels, torch.ones(len(levels), 1, dtype=F64))
    assert torch.equal(start, levels)
    torch.testing.assert_close(end, floor, rtol=0, atol=1e-12)
    assert (speed >= 0).all()


@given(batches(F64), st.data(), st.floats(0.001, 0.999))
def test_rate_is_minus_the_derivative(case: tuple[Tensor, int], data: st.DataObject, clock: float) -> None:
    levels, _ = case
    path = data.draw(paths(*levels.shape))
    at = torch.full((len(levels),), clock, dtype=F64, requires_grad=True)
    level, rate = path.at(levels, at)
    automatic = [
        torch.autograd.grad(x, at, retain_graph=True)[0].sum() if x.requires_grad else 0 for x in level.flatten()
    ]
    torch.testing.assert_close(-torch.tensor(automatic, dtype=F64), rate.detach().flatten())
    assert (rate[levels <= T_MIN] == 0).all()
    assert (level[levels <= T_MIN] == levels[levels <= T_MIN]).all()


def test_right_derivative_at_the_start() -> None:
    levels, zero = torch.tensor([[0.3, 1.0]]), torch.zeros(1)
    assert early_stop.at(levels, zero)[1].tolist() == [[1.0, 1.0]]
    assert late_start.at(levels, zero)[1].tolist() == [[0.0, 1.0]]
    torch.testing.assert_close(full.at(levels, zero)[1], torch.tensor([[0.2, 0.9]]))
    assert by_order(torch.tensor([0.0, 1.0]), 0.5).at(levels, zero)[1].tolist() == [[0.0, 0.0]]


def test_gradients_reach_levels_and_order() -> None:
    levels = torch.tensor([[0.8, 0.3]], requires_grad=True)
    level, _ = early_stop.at(levels, torch.tensor([0.25]))
    level.sum().backward()
    # The first token's share of its way is (.55 − .1)/(.8 − .1); the second has arrived.
    torch.testing.assert_close(levels.grad, torch.tensor([[0.45 / 0.7, 0.0]]))
    order = torch.tensor([0.5, 0.0], requires_grad=True)
    level, _ = by_order(order, 0.5).at(torch.ones(1, 2), torch.tensor([0.5]))
    level.sum().backward()
    assert order.grad.tolist() == [1.0, 0.0]


@given(batches(F64), st.data())
def test_plan_rows_lie_on_the_path(case: tuple[Tensor, int], data: st.DataObject) -> None:
    levels, max_steps = case
    path = data.draw(paths(*levels.shape))
    plan = path(levels, max_steps)
    own = own_steps(path, plan, levels)
    wait, _ = path.span(levels.unsqueeze(1), max_steps)
    for k in {0, max_steps // 3, max_steps // 2, max_steps - 1}:
        level, _ = path.at(levels, torch.full((len(levels),), k / max_steps, dtype=F64))
        on = own[:, k] & (k > wait[:, 0])
        torch.testing.assert_close(plan[:, k][on], level[on], rtol=0, atol=1e-12)


# Bad input


@pytest.mark.parametrize(
    ("levels", "max_steps", "message"),
    [
        (torch.tensor([[1.5]]), 4, r"outside .* 1.5 at"),
        (torch.tensor([[math.nan]]), 4, r"outside .* nan at"),
        (torch.tensor([0.5]), 4, r"shape \(1,\).*\(B, N\)"),
        (torch.tensor([[0.5]]), 0, "max_steps = 0"),
    ],
)
@pytest.mark.parametrize("path", [early_stop, late_start, full, by_order(torch.zeros(1), 0.5)], ids=repr)
def test_bad_levels_are_named(path: Path, levels: Tensor, max_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        path(levels, max_steps)


def test_other_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match=r"torch\.int64"):
        early_stop(torch.ones(1, 1, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"clock of shape \(3,\)"):
        early_stop.at(torch.ones(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"order has shape \(3,\): needs \(4,\) or \(2, 4\)"):
        by_order(torch.zeros(3), 0.5)(torch.ones(2, 4), 5)
    with pytest.raises(ValueError, match="order has 1 of 2 values outside"):
        by_order(torch.tensor([0.0, 2.0]), 0.5)
    with pytest.raises(ValueError, match=r"order has shape \(\)"):
        by_order(torch.tensor(0.5), 0.5)
    with pytest.raises(ValueError, match=r"width = 0\.0"):
        by_order(torch.zeros(2), 0.0)


def test_no_tokens_and_names() -> None:
    assert early_stop(torch.empty(2, 0), 3).shape == (2, 4, 0)
    assert [repr(path) for path in (early_stop, late_start, full)] == ["early_stop", "late_start", "full"]
    assert repr(by_order(torch.zeros(2), 0.25)) == "by_order(order of shape (2,), width=0.25)"


# A rule of one's own


@given(batches(), st.data())
def test_rows_of_our_paths_are_right(case: tuple[Tensor, int], data: st.DataObject) -> None:
    levels, max_steps = case
    check_rows(data.draw(paths(*levels.shape))(levels, max_steps), levels, max_steps)


ROWS = early_stop(torch.tensor([[0.5, 0.1, 1.0]]), 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda rows: rows[:, :-1], ValueError, r"shape \(1, 4, 3\): .* \(1, 5, 3\)"),
        (lambda rows: rows[0], ValueError, r"shape \(5, 3\)"),
        (lambda rows: rows.double(), TypeError, "torch.float64 on cpu: needs .* torch.float32"),
        (lambda rows: rows.tolist(), TypeError, "the plan is list"),
        (
            lambda rows: rows.flip(1),
            ValueError,
            r"2 of 3 tokens, the first \(0, 0\).* of level 0.5, whose rows are 0, ",
        ),
        (lambda rows: rows.index_fill(1, torch.tensor([4]), 0.1), ValueError, "3 of 3 tokens"),
        (lambda rows: rows.index_fill(1, torch.tensor([2]), math.nan), ValueError, "3 of 3 tokens.*nan"),
        (lambda rows: 0 * rows, ValueError, r"2 of 3 tokens.*start at that level \(or at 0 where max_steps times"),
        (lambda rows: rows.clamp(max=0.9), ValueError, r"1 of 3 tokens, the first \(0, 2\)"),
    ],
)
def test_wrong_rows_are_named(change: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_rows(change(ROWS), torch.tensor([[0.5, 0.1, 1.0]]), 4)
