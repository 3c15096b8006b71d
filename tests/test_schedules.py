"""Every schedule: values, derivatives, inverse and SDE coefficients agree; ends are exact; nothing is infinite."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from evo.schedules import (
    Cosine,
    InformationUniform,
    Learned,
    LinearVP,
    RectifiedFlow,
    Schedule,
    Shifted,
    Sigmoid,
    VarianceExploding,
    check_levels,
    from_config,
)

F64 = torch.float64


class Quadratic(Schedule):
    """A user's schedule: one method, one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(16.0, dtype=F64))

    def log_snr(self, t: Tensor) -> Tensor:
        return 8 - self.slope.to(t.dtype) * t - 3 * t**2


def trained(scale: float = 1.5) -> Learned:
    """A `Learned` schedule far from its start."""
    schedule = Learned(12).double()
    with torch.no_grad():
        schedule.log_speed.copy_(scale * torch.randn(14, dtype=F64, generator=torch.Generator().manual_seed(0)))
    return schedule


SCHEDULES: dict[str, Schedule] = {
    "cosine": Cosine(),
    "linear_vp": LinearVP(),
    "constant_vp": LinearVP(4.0, 4.0),
    "variance_exploding": VarianceExploding(),
    "rectified_flow": RectifiedFlow(),
    "sigmoid": Sigmoid(),
    "sigmoid_skewed": Sigmoid(-1.0, 6.0),
    "trained": trained(),
    "information_uniform": InformationUniform(3.3, 259),
    "shifted_cosine": Shifted(Cosine(), -3.0),
    "shifted_flow": Shifted(RectifiedFlow(), 1.5),
    "shifted_exploding": Shifted(VarianceExploding(), 2.0),
    "shifted_twice": Shifted(Shifted(LinearVP(), -2.0), 1.0),
    "user": Quadratic(),
}
EXACT_AT_0 = ("cosine", "linear_vp", "constant_vp", "rectified_flow", "sigmoid", "sigmoid_skewed", "trained")
EXACT_AT_0 += ("information_uniform", "shifted_cosine", "shifted_flow", "shifted_twice")
EXACT_AT_1 = tuple(name for name in EXACT_AT_0 if name not in ("linear_vp", "constant_vp", "shifted_twice"))
METHODS = ("signal", "noise", "log_snr", "d_signal", "d_noise", "d_log_snr", "drift", "diffusion", "snr", "d_snr")

few = settings(max_examples=max(1, settings.default.max_examples // 3))
"""Examples for a property that is held to every schedule."""
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
inner_levels = st.lists(st.floats(0.002, 0.998), min_size=5, max_size=9).map(lambda x: torch.tensor(x, dtype=F64))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Values, derivatives, inverse


@every_schedule
@pytest.mark.parametrize("name", ["signal", "noise", "log_snr"])
@few
@given(t=inner_levels)
def test_derivative_is_the_slope(schedule: Schedule, name: str, t: Tensor) -> None:
    value, slope = getattr(schedule, name), getattr(schedule, f"d_{name}")(t)
    leaf = t.clone().requires_grad_()
    total = value(leaf).sum()
    automatic = torch.autograd.grad(total, leaf)[0] if total.requires_grad and total.grad_fn else torch.zeros_like(t)
    close(slope, automatic, 1e-11)
    step = 1e-6 * torch.minimum(t, 1 - t)
    close(slope, (value(t + step) - value(t - step)) / (2 * step), 1e-5)


@every_schedule
@few
@given(t=inner_levels)
def test_log_snr_is_that_of_signal_and_noise(schedule: Schedule, t: Tensor) -> None:
    close(schedule.log_snr(t), 2 * (schedule.signal(t) / schedule.noise(t)).log(), 1e-12)
    close(schedule.d_snr(t), -2 * schedule.snr(t) * schedule.diffusion(t) ** 2 / (2 * schedule.noise(t) ** 2), 1e-11)


@every_schedule
@few
@given(t=inner_levels)
def test_inverse_returns_the_level(schedule: Schedule, t: Tensor) -> None:
    # A rounding of log_snr moves the level by that over its slope.
    rounding = 4e-16 * (1 + schedule.log_snr(t).abs()) / schedule.d_log_snr(t).abs()
    assert ((schedule.level_of_log_snr(schedule.log_snr(t)) - t).abs() <= 4e-15 + 4 * rounding).all()


@every_schedule
def test_inverse_in_float32(schedule: Schedule) -> None:
    t = torch.linspace(0.02, 0.98, 97)
    close(schedule.level_of_log_snr(schedule.log_snr(t)), t, 1e-5)


@every_schedule
def test_inverse_beyond_the_ends_is_the_nearer_end(schedule: Schedule) -> None:
    for dtype in (torch.float32, F64):
        far = torch.tensor([math.inf, 400.0, -400.0, -math.inf], dtype=dtype)
        wanted = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=dtype)
        close(schedule.level_of_log_snr(far), wanted, 1e-5 if dtype is torch.float32 else 1e-12)


@every_schedule
def test_log_snr_falls_strictly(schedule: Schedule) -> None:
    t = torch.linspace(1e-4, 1 - 1e-4, 5001, dtype=F64)
    assert (schedule.log_snr(t).diff() < 0).all()
    assert (schedule.d_log_snr(t) < 0).all()


@every_schedule
@few
@given(t=inner_levels)
def test_gradient_of_the_inverse(schedule: Schedule, t: Tensor) -> None:
    log_snr = schedule.log_snr(t).detach().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.level_of_log_snr(log_snr).sum(), log_snr)
    close(slope, 1 / schedule.d_log_snr(t).detach(), 1e-9)


def test_gradient_of_the_inverse_reaches_parameters_and_not_beyond_the_ends() -> None:
    schedule = Quadratic()
    level = schedule.level_of_log_snr(torch.tensor([0.0, 100.0, -100.0], dtype=F64))
    assert level[1:].tolist() == [0.0, 1.0]
    level.sum().backward()
    # From 8 − a·t − 3·t² = 0 with a = 16: dt/da = −t / (a + 6·t).
    t = level[0].detach()
    close(schedule.slope.grad, -t / (16 + 6 * t), 1e-12)


@every_schedule
@few
@given(t=inner_levels)
def test_sde_coefficients(schedule: Schedule, t: Tensor) -> None:
    signal, noise, drift = schedule.signal(t), schedule.noise(t), schedule.drift(t)
    close(drift * signal, schedule.d_signal(t), 1e-12)
    close(schedule.diffusion(t) ** 2, 2 * noise * schedule.d_noise(t) - 2 * drift * noise**2, 1e-11)


# Ends, shapes, dtypes


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_everything_is_finite_at_both_ends(schedule: Schedule, dtype: torch.dtype) -> None:
    for name in METHODS:
        t = torch.tensor([0.0, 1e-9, 1e-4, 1 - 1e-7, 1.0], dtype=dtype, requires_grad=True)
        value = getattr(schedule, name)(t)
        assert value.isfinite().all(), name
        # The slope of √(1 − s²) at 0 is infinite; the methods that stand for slopes are not.
        if value.requires_grad and name not in ("signal", "noise"):
            (slope,) = torch.autograd.grad(value.sum(), t, allow_unused=True, materialize_grads=True)
            assert slope.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_exact_ends(dtype: torch.dtype) -> None:
    for size in (1, 3, 8, 33):  # vectorised code has a remainder
        zero, one = torch.zeros(size, dtype=dtype), torch.ones(size, dtype=dtype)
        for name in EXACT_AT_0:
            assert torch.equal(SCHEDULES[name].signal(zero), one), name
            assert torch.equal(SCHEDULES[name].noise(zero), zero), name
        for name in EXACT_AT_1:
            assert torch.equal(SCHEDULES[name].signal(one), zero), name
            assert torch.equal(SCHEDULES[name].noise(one), one), name


@every_schedule
def test_shape_and_dtype_are_kept(schedule: Schedule) -> None:
    for name in (*METHODS, "level_of_log_snr"):
        for dtype in (torch.float32, F64):
            for shape in ((), (0, 3), (2, 3), (2, 1, 4)):
                t = torch.full(shape, 0.4, dtype=dtype)
                value = getattr(schedule, name)(t)
                assert (value.shape, value.dtype) == (t.shape, t.dtype), name
            strided = torch.linspace(0.1, 0.9, 12, dtype=dtype).view(3, 4).T
            torch.testing.assert_close(getattr(schedule, name)(strided), getattr(schedule, name)(strided.contiguous()))


@every_schedule
def test_float32_agrees_with_float64(schedule: Schedule) -> None:
    t = torch.linspace(0.01, 0.99, 99)
    for name in METHODS:
        method = getattr(schedule, name)
        torch.testing.assert_close(method(t).double(), method(t.double()), rtol=3e-4, atol=3e-6)


# The kinds of schedule


@every_schedule
@few
@given(t=inner_levels)
def test_scale_is_kept(schedule: Schedule, t: Tensor) -> None:
    signal, noise = schedule.signal(t), schedule.noise(t)
    one = torch.ones_like(t)
    close(schedule.scale(signal, noise), one, 1e-14)
    close(schedule.scale(3 * signal, 3 * noise), 3 * one, 1e-14)
    if schedule.variance_preserving:
        close(signal**2 + noise**2, one, 1e-14)
        close(schedule.alpha_bar(t), schedule.log_snr(t).sigmoid(), 1e-13)
    else:
        with pytest.raises(ValueError, match="does not keep that sum at 1"):
            schedule.alpha_bar(t)


@given(t=inner_levels)
def test_closed_forms(t: Tensor) -> None:
    close(Cosine().alpha_bar(t), (math.pi * t / 2).cos() ** 2, 1e-14)
    nodes = torch.linspace(0, 1, 3, dtype=F64)[:, None] * t
    beta = 0.1 + 19.9 * nodes
    simpson = t / 6 * (beta[0] + 4 * beta[1] + beta[2])
    close(LinearVP().alpha_bar(t), (-simpson).exp(), 1e-13)
    close(LinearVP().drift(t), -beta[2] / 2, 1e-14)
    close(LinearVP().diffusion(t), beta[2].sqrt(), 1e-14)
    start, end = torch.tensor([-3.0, 3.0], dtype=F64).sigmoid()
    close(Sigmoid().alpha_bar(t), (end - (6 * t - 3).sigmoid()) / (end - start), 1e-14)
    close(VarianceExploding().noise(t), 0.01 ** (1 - t) * 50**t, 1e-13)
    close(RectifiedFlow().diffusion(t) ** 2, 2 * t / (1 - t), 1e-13)


@given(t=inner_levels, shift=st.floats(-5, 5))
def test_shift(t: Tensor, shift: float) -> None:
    for schedule in (Cosine(), LinearVP(), VarianceExploding(), RectifiedFlow(), Sigmoid(), trained()):
        shifted = Shifted(schedule, shift)
        close(shifted.log_snr(t), schedule.log_snr(t) + shift, 1e-13)
        again = Shifted(shifted, -shift)
        close(again.signal(t), schedule.signal(t), 1e-13)
        close(again.noise(t), schedule.noise(t), 1e-13)
    # On the straight line a shift is the walk t → k·t / (1 − t + k·t) (Esser et al. 2024).
    k = math.exp(-shift / 2)
    close(Shifted(RectifiedFlow(), shift).noise(t), k * t / (1 - t + k * t), 1e-13)


def test_learned_starts_as_the_cosine_and_stays_monotone_wherever_it_goes() -> None:
    t = torch.linspace(0, 1, 301, dtype=F64)
    for name in METHODS:
        close(getattr(Learned(), name)(t), getattr(Cosine(), name)(t), 1e-11)
    for wild in (trained(20.0), trained(-20.0)):
        for dtype in (torch.float32, F64):
            inner = torch.linspace(1e-4, 1 - 1e-4, 301, dtype=dtype)
            assert wild.log_snr(inner).isfinite().all()
            assert (wild.log_snr(inner).diff() < 0).all()
            back = wild.level_of_log_snr(wild.log_snr(inner))
            close(back, inner, 1e-3 if dtype is torch.float32 else 1e-10)


def test_learned_trains_through_values_and_derivatives() -> None:
    schedule, target = Learned(12).double(), trained(0.7)
    t = torch.linspace(0.05, 0.95, 64, dtype=F64)

    def distance() -> Tensor:
        slope = (schedule.d_log_snr(t) - target.d_log_snr(t).detach()).square().mean()
        return (schedule.log_snr(t) - target.log_snr(t).detach()).square().mean() + 0.01 * slope

    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.05)
    before = distance().item()
    for _ in range(200):
        optimizer.zero_grad()
        distance().backward()
        optimizer.step()
    assert distance().item() < before / 100
    assert schedule.signal(torch.tensor([0.0, 1.0])).tolist() == [1.0, 0.0]


# Gradient modes, compilation


def test_automatic_derivatives_in_every_gradient_mode() -> None:
    schedule, t = Quadratic(), torch.tensor([0.25, 0.5], dtype=F64)
    wanted = [-17.5, -19.0]
    with torch.no_grad():
        assert schedule.d_log_snr(t).tolist() == wanted
    with torch.inference_mode():
        assert schedule.d_log_snr(t).tolist() == wanted
        assert schedule.level_of_log_snr(schedule.log_snr(t)).tolist() == pytest.approx([0.25, 0.5], abs=1e-15)
    slope = schedule.d_log_snr(t.requires_grad_())
    slope.sum().backward()
    assert (t.grad.tolist(), schedule.slope.grad.item()) == ([-6.0, -6.0], -2.0)


@pytest.mark.parametrize("name", ["cosine", "trained", "sigmoid", "shifted_cosine", "user"])
def test_traces_into_one_graph(name: str) -> None:
    schedule, t = SCHEDULES[name], torch.linspace(0, 1, 12, dtype=F64).view(3, 4)
    methods = (*METHODS, "level_of_log_snr") if name in ("cosine", "user") else METHODS

    def everything(t: Tensor) -> list[Tensor]:
        return [getattr(schedule, method)(t) for method in methods]

    compiled = torch.compile(everything, backend="eager", fullgraph=True)
    for value, wanted in zip(compiled(t), everything(t), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


# Saving, naming, refusing


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "user"])
def test_config_and_state_rebuild_the_schedule(name: str) -> None:
    schedule = SCHEDULES[name]
    again = from_config(json.loads(json.dumps(schedule.config())))
    assert repr(again) == repr(schedule)
    again.load_state_dict(schedule.state_dict())
    t = torch.linspace(0, 1, 21, dtype=F64)
    for method in METHODS:
        # A parameter is loaded in the precision of the module that loads it.
        torch.testing.assert_close(getattr(again, method)(t), getattr(schedule, method)(t), rtol=1e-5, atol=1e-5)


def test_information_table_survives_casts_and_meta_devices() -> None:
    schedule, t = InformationUniform(3.3, 259), torch.linspace(0, 1, 101)
    wanted = schedule.log_snr(t)
    assert torch.equal(schedule.to(torch.bfloat16).log_snr(t), wanted)
    with torch.device("meta"):
        built = InformationUniform(3.3, 259)
    assert torch.equal(built.to_empty(device="cpu").log_snr(t), wanted)


def test_repr_names_the_options() -> None:
    assert repr(LinearVP()) == "LinearVP(t_min=0.1, beta_min=0.1, beta_max=20.0)"
    assert "log_snr_shift=-3.0" in repr(Shifted(Cosine(), -3))
    assert Shifted(Cosine(t_min=0.2), 1.0).t_min == 0.2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cosine(t_min=0.0), "t_min = 0.0"),
        (lambda: LinearVP(0.0, 1.0), "beta_min = 0.0"),
        (lambda: VarianceExploding(2.0, 1.0), "sigma_max = 1.0"),
        (lambda: Sigmoid(3.0, -3.0), "start = 3.0"),
        (lambda: Shifted(Cosine(), math.nan), "log_snr_shift = nan"),
        (lambda: Learned(0), "intervals = 0"),
        (lambda: InformationUniform(0.0, 100), "radius = 0.0"),
        (lambda: InformationUniform(1.0, 1), "vocab_size = 1"),
        (lambda: InformationUniform(1.0, 100, tail=1.0), "tail = 1.0"),
        (lambda: from_config({"name": "linear"}), "'linear' is not one of cosine, information_uniform"),
        (lambda: from_config({}), "None is not one of"),
        (lambda: from_config(Quadratic().config()), r"'quadratic' is not one of .* hand over the object"),
        (lambda: from_config({"name": "cosine", "beta": 1}), r"does not take the options .*beta"),
    ],
)
def test_what_is_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_check_levels() -> None:
    check_levels(torch.tensor([0.0, 0.5, 1.0]))
    check_levels(torch.empty(0, 3))
    with pytest.raises(ValueError, match=r"1 of 2 values outside \[0, 1\], the first nan at \(1,\)"):
        check_levels(torch.tensor([0.5, math.nan]))
    with pytest.raises(ValueError, match=r"start has 1 of 1 values outside .* 1.5 at \(\)"):
        check_levels(torch.tensor(1.5), "start")
    with pytest.raises(TypeError, match=r"levels is a tensor of torch.int64"):
        check_levels(torch.tensor([1]))
    with pytest.raises(TypeError, match=r"levels is float 0\.5"):
        check_levels(0.5)


@every_schedule
def test_gradients_are_finite_at_the_ends(schedule: Schedule) -> None:
    for name in METHODS:
        ends = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
        value = getattr(schedule, name)(ends).sum()
        (found,) = torch.autograd.grad(value, ends, allow_unused=True) if value.requires_grad else (None,)
        assert found is None or found.isfinite().all(), name
