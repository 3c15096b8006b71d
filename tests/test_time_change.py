"""P-1: the autoregressive time of every schedule is strictly increasing, smooth and invertible on [0, t_max]."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evo.schedules import Cosine, Schedule, TimeChange, VarianceExploding
from tests.test_schedules import close, every_schedule, few

F64 = torch.float64
fractions = st.lists(st.floats(0, 1), min_size=1, max_size=9).map(lambda x: torch.tensor(x, dtype=F64))


@every_schedule
def test_ends(schedule: Schedule) -> None:
    change = TimeChange(schedule)
    assert 0.99 < change.t_max <= 1
    for dtype in (torch.float32, F64):
        ends = change.s(torch.tensor([0.0, change.t_max, 1.0], dtype=dtype))
        assert abs(ends[0]) < 1e-12  # 0, where there is no noise at 0 whose rounding is left over
        # In float32 a level near 1 is known to 6e-8, and s is steep there.
        close(ends[1:], torch.ones(2, dtype=dtype), 1e-3 if dtype is torch.float32 else 1e-12)
        assert change.t(torch.tensor([0.0], dtype=dtype)).item() == pytest.approx(0, abs=1e-7)
    reached = schedule.log_snr(torch.tensor(change.t_max, dtype=F64))
    lowest = schedule.log_snr(torch.tensor(1.0, dtype=F64)).clamp(min=-14)
    close(reached, lowest, 1e-3)


@every_schedule
def test_strictly_increasing(schedule: Schedule) -> None:
    change = TimeChange(schedule)
    # From a millionth on: nearer to 0, neighbouring float64 values of a schedule with noise at 0 have one s.
    t = torch.cat((torch.logspace(-6, -2, 400, dtype=F64), torch.linspace(0.0101, change.t_max, 4000, dtype=F64)))
    assert (change.s(t).diff() > 0).all()
    assert (change.d_s(t) > 0).all()
    beyond = torch.linspace(change.t_max, 1, 5, dtype=F64)[1:]
    if change.t_max < 1:
        close(change.s(beyond), torch.ones_like(beyond), 1e-12)
        assert (change.d_s(beyond) == 0).all()


@every_schedule
@few
@given(fraction=fractions)
def test_invertible(schedule: Schedule, fraction: Tensor) -> None:
    change = TimeChange(schedule)
    t = fraction * change.t_max
    close(change.t(change.s(t)), t, 3e-14)
    close(change.s(change.t(fraction)), fraction, 3e-11)  # d_s reaches thousands


@every_schedule
@few
@given(fraction=st.lists(st.floats(1e-3, 1 - 1e-3), min_size=1, max_size=9).map(lambda x: torch.tensor(x, dtype=F64)))
def test_derivative(schedule: Schedule, fraction: Tensor) -> None:
    change = TimeChange(schedule)
    t = (fraction * change.t_max).requires_grad_()
    (slope,) = torch.autograd.grad(change.s(t).sum(), t)
    close(change.d_s(t).detach(), slope, 1e-9)


@every_schedule
@few
@given(fraction=fractions.map(lambda x: 0.05 + 0.9 * x))
def test_flow_of_a_gaussian_in_s(schedule: Schedule, fraction: Tensor) -> None:
    """dy/ds = −C·∇_y log p along the exact flow of N(m, σ²) in y = z/s, whose variance is σ² + n²/s²."""
    change, mean, variance = TimeChange(schedule), 0.7, 0.3
    start = 1 / schedule.snr(torch.tensor(0.0, dtype=F64)) if schedule.noise(torch.zeros(1, dtype=F64)) > 0 else 0.0
    s = fraction.clone().requires_grad_()
    spread = variance + start + 2 * change.constant * s
    y = mean + 1.3 * spread.sqrt()
    (slope,) = torch.autograd.grad(y.sum(), s)
    ratio = 1 / schedule.snr(change.t(fraction))
    score = -(y.detach() - mean) / (variance + ratio)
    close(slope, -change.constant * score, 1e-8)


def test_figures_of_the_cosine_schedule() -> None:
    change = TimeChange(Cosine())
    assert change.t_max == pytest.approx(2 / math.pi * math.atan(math.exp(7)), abs=1e-7)
    assert round(change.t_max, 5) == 0.99942
    assert change.s(torch.tensor(0.9)).item() == pytest.approx(3.3e-5, rel=0.01)
    assert change.constant == pytest.approx(math.exp(14) / 2, rel=1e-3)
    assert repr(change) == "TimeChange(Cosine(t_min=0.1), t_max=0.99942, constant=6.0125e+05)"


def test_noise_at_level_0_is_subtracted() -> None:
    change = TimeChange(VarianceExploding(0.5, 4.0))
    assert change.t_max == 1
    assert change.constant == pytest.approx((16 - 0.25) / 2)
    t = torch.linspace(0, 1, 7, dtype=F64)
    close(change.s(t), (0.25 * 64**t - 0.25) / 15.75, 1e-14)
