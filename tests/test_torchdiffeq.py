"""`TorchDiffEq`: every method, and the gaps of torchdiffeq that it closes."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS

from evo.solvers import RK4, SolverError, TorchDiffEq, integrate
from evo.solvers.contract import check
from evo.solvers.torch_diffeq_methods import METHODS
from evo.solvers.torch_diffeq_norm import TokenNorm

from .solver_problems import Spans, order_of, riccati, riccati_solution, spans

FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "explicit_adams": 4}
ADAPTIVE = ["adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8", "scipy_solver"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def adaptive(method: str = "dopri5", tolerance: float = 1e-6, **options: object) -> TorchDiffEq:
    return TorchDiffEq(method, rtol=tolerance, atol=tolerance, **options)


def test_every_method_of_torchdiffeq_is_served() -> None:
    assert set(METHODS) == set(SOLVERS)


@pytest.mark.parametrize("method", FIXED)
@settings(max_examples=5)
@given(problem=spans(dim=24))
def test_order(method: str, problem: Spans) -> None:
    exact = riccati_solution(problem.latents, problem.start, problem.end)
    order = order_of(lambda n: TorchDiffEq(method, steps=n), riccati, exact, problem, (16, 32, 64, 128))
    assert abs(order - FIXED[method]) < 0.2


@pytest.mark.parametrize("order", [4, 5])
@pytest.mark.parametrize("method", ["implicit_adams", "fixed_adams"])
def test_implicit_adams_has_the_order_it_is_told_to_have(method: str, order: int) -> None:
    latents = torch.linspace(0.1, 0.9, 48, dtype=torch.float64).view(2, 2, 12)
    exact = riccati_solution(latents, 1.0, 0.0)
    tight = {"rtol": 1e-12, "atol": 1e-14, "max_iters": 20}
    found = order_of(
        lambda n: TorchDiffEq(method, steps=n, max_order=order, **tight),
        riccati,
        exact,
        Spans(latents, 1.0, 0.0),
        (48, 96, 192),
    )
    assert abs(found - order) < 0.5 if order == 4 else found > 4


def test_explicit_adams_is_stable_unlike_its_default_order_in_torchdiffeq() -> None:
    latents = torch.ones(1, 1, 1, dtype=torch.float64)
    exact = math.exp(-9.0)
    ours = integrate(lambda z, t: 10 * z, latents, 1.0, 0.1, solver=TorchDiffEq("explicit_adams", steps=160))
    theirs = integrate(
        lambda z, t: 10 * z, latents, 1.0, 0.1, solver=TorchDiffEq("explicit_adams", steps=160, max_order=12)
    )
    assert abs(ours.latents.item() - exact) < 1e-6
    assert abs(theirs.latents.item()) > 1e6


@pytest.mark.parametrize("method", ADAPTIVE)
@settings(max_examples=5)
@given(problem=spans())
def test_adaptive_methods_keep_their_tolerance(method: str, problem: Spans) -> None:
    exact = riccati_solution(problem.latents, problem.start, problem.end)
    loose, tight = (
        integrate(riccati, problem.latents, problem.start, problem.end, solver=adaptive(method, tolerance))
        for tolerance in (1e-3, 1e-5)
    )
    loose_error, tight_error = ((solution.latents - exact).abs().max() for solution in (loose, tight))
    assert tight_error < 5e-3  # fehlberg2 estimates its error poorly
    assert tight_error < max(loose_error / 5, 1e-5)
    assert tight.nfe >= loose.nfe
    assert torch.equal(tight.latents[problem.frozen], problem.latents[problem.frozen])


@pytest.mark.parametrize(("method", "stages"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)])
@given(steps=st.integers(1, 50), problem=spans())
def test_exactly_as_many_steps_as_asked_for(method: str, stages: int, steps: int, problem: Spans) -> None:
    calls = []

    def field(latents: Tensor, level: Tensor) -> Tensor:
        calls.append(level)
        return riccati(latents, level)

    solution = integrate(field, problem.latents, problem.start, problem.end, solver=TorchDiffEq(method, steps=steps))
    assert solution.nfe == len(calls) == stages * steps


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_same_numbers_as_torchdiffeq_itself(method: str) -> None:
    latents = torch.rand(2, 3, 4, dtype=torch.float64)
    control = {"rtol": 1e-8, "atol": 1e-8} if method == "dopri5" else {"steps": 20}
    ours = integrate(riccati, latents, 1.0, 0.2, solver=TorchDiffEq(method, **control)).latents

    def field(t: Tensor, latents: Tensor) -> Tensor:
        return riccati(latents, t.expand(2, 3))

    options = {} if method == "dopri5" else {"step_size": 0.04}
    times = torch.tensor([1.0, 0.2], dtype=torch.float64)
    theirs = odeint(field, latents, times, method=method, rtol=1e-8, atol=1e-8, options=options)[-1]
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6 if method == "dopri5" else 1e-12)


def test_frozen_and_easy_tokens_do_not_loosen_the_tolerance_of_a_hard_one() -> None:
    def field(latents: Tensor, level: Tensor) -> Tensor:
        return 30 * torch.cos(30 * level).unsqueeze(-1) * latents

    hard = torch.ones(1, 1, 4, dtype=torch.float64)
    alone = integrate(field, hard, 1.0, 0.0, solver=adaptive(tolerance=1e-4))
    exact = math.exp(-math.sin(30.0))
    assert abs(alone.latents[0, 0, 0] - exact) < 1e-2

    crowd = torch.cat((hard, torch.full((1, 4096, 4), 1.0, dtype=torch.float64)), 1)
    start = torch.zeros(1, 4097, dtype=torch.float64)
    start[0, 0] = 1.0
    among_frozen = integrate(field, crowd, start, 0.0, solver=adaptive(tolerance=1e-4))
    crowd[:, 1:] = 0.0  # where the field vanishes
    among_easy = integrate(field, crowd, 1.0, 0.0, solver=adaptive(tolerance=1e-4))
    for solution in (among_frozen, among_easy):
        assert solution.nfe == alone.nfe
        assert torch.allclose(solution.latents[0, 0], alone.latents[0, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_nan_is_told_in_words(method: str) -> None:
    def field(latents: Tensor, level: Tensor) -> Tensor:
        return torch.where((level < 0.5).unsqueeze(-1), float("nan"), -latents)

    latents, end = torch.ones(1, 2, 2), torch.tensor([[0.0, 0.6]])
    with pytest.raises(SolverError, match=r"the field gave NaN or infinity.* \(0, 0\) at level 0\.\d+") as raised:
        integrate(field, latents, 1.0, end, solver=adaptive(method, 1e-3))
    assert "(0, 1)" not in str(raised.value)
    solution = integrate(field, latents, 1.0, end, solver=adaptive(method, 1e-3), throw=False)
    assert "NaN or infinity" in solution.status[0][0]
    assert solution.status[0][1].startswith("Stopped at level")


def test_nan_in_a_step_that_was_too_bold_is_tried_again_smaller() -> None:
    def field(latents: Tensor, level: Tensor) -> Tensor:
        return -(latents.sqrt())  # NaN below 0, where a long step leads; the solution stays above

    latents = torch.full((1, 1, 1), 1.0, dtype=torch.float64)
    solution = integrate(field, latents, 0.0, 1.0, solver=adaptive(tolerance=1e-6, first_step=1.0, max_step=1.0))
    assert abs(solution.latents.item() - 0.25) < 1e-5
    tame = integrate(
        lambda z, t: torch.where(z < 0.9, float("nan"), -z / 10), latents, 0.0, 1.0, solver=adaptive(first_step=1.0)
    )
    assert abs(tame.latents.item() - math.exp(-0.1)) < 1e-5


def test_underflow_is_told_in_words() -> None:
    latents = torch.tensor([[[2.0], [0.5]]], dtype=torch.float64)  # 1/z falls by 1, and the first z never arrives
    with pytest.raises(
        SolverError, match=r"step size underflowed, for the field jumps .* \(0, 0\) at level 0\.[45]\d*,"
    ) as raised:
        integrate(lambda z, t: -(z**2), latents, 1.0, 0.0, solver=adaptive(tolerance=1e-3))
    assert "(0, 1)" not in str(raised.value)


def test_least_step_and_most_steps_are_told_in_words() -> None:
    def field(latents: Tensor, level: Tensor) -> Tensor:
        return torch.where((level < 0.5).unsqueeze(-1), float("nan"), -latents)

    with pytest.raises(SolverError, match="NaN or infinity"):
        integrate(field, torch.ones(1, 1, 1), 1.0, 0.0, solver=adaptive(min_step=0.01))
    with pytest.raises(SolverError, match="max_num_steps=3 steps"):
        integrate(riccati, torch.ones(1, 1, 1), 1.0, 0.0, solver=adaptive(tolerance=1e-5, max_num_steps=3))


@pytest.mark.parametrize(
    "solver", [TorchDiffEq("rk4", steps=3), adaptive(max_num_steps=9, jump_t=[0.3]), TorchDiffEq("euler")], ids=repr
)
def test_it_is_pickled_and_copied(solver: TorchDiffEq) -> None:
    for again in (pickle.loads(pickle.dumps(solver)), copy.copy(solver), copy.deepcopy(solver)):
        assert repr(again) == repr(solver)


def test_options_reach_torchdiffeq() -> None:
    latents = torch.rand(1, 2, 3, dtype=torch.float64)
    nfe = {
        str(options): integrate(riccati, latents, 1.0, 0.0, solver=adaptive(tolerance=1e-3, **options)).nfe
        for options in ({}, {"max_step": 0.05}, {"jump_t": [0.3, 0.6]}, {"step_t": [0.25]}, {"first_step": 1e-3})
    }
    assert min(nfe, key=lambda k: nfe[k]) == "{}"
    assert nfe["{'max_step': 0.05}"] >= 6 * 20
    scipy = {
        solver: integrate(riccati, latents, 1.0, 0.0, solver=adaptive("scipy_solver", solver=solver)).latents
        for solver in ("RK45", "DOP853", "BDF", "LSODA")
    }
    for found in scipy.values():
        assert torch.allclose(found, riccati_solution(latents, 1.0, 0.0), rtol=0, atol=1e-4)
    perturbed = integrate(riccati, latents, 1.0, 0.0, solver=TorchDiffEq("rk4", steps=5, perturb=True)).latents
    assert torch.allclose(perturbed, integrate(riccati, latents, 1.0, 0.0, solver=TorchDiffEq("rk4", steps=5)).latents)


def test_scipy_giving_up_is_an_error() -> None:
    with pytest.raises(SolverError, match="SciPy gave up"):
        integrate(
            lambda z, t: z**2, torch.full((1, 1, 1), 2.0), 0.0, 1.0, solver=adaptive("scipy_solver", solver="RK45")
        )


class Network(nn.Module):
    """A field with weights, in which tokens see each other."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)

    def forward(self, latents: Tensor, level: Tensor) -> Tensor:
        return torch.tanh((latents + latents.mean(1, keepdim=True)) @ self.weight) * (1 + level.unsqueeze(-1))


def gradients(solver: object, problem: Spans) -> Tensor:
    field, latents = Network(), problem.latents.clone().requires_grad_()
    loss = integrate(field, latents, problem.start, problem.end, solver=solver).latents.square().sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (latents, field.weight))])


@pytest.mark.parametrize("method", ["dopri5", "rk4", "heun3", "implicit_adams", "scipy_solver"])
@settings(max_examples=3)
@given(problem=spans())
def test_adjoint_and_direct_gradients_agree(method: str, problem: Spans) -> None:
    control = {"rtol": 1e-7, "atol": 1e-7} if METHODS[method].adaptive else {"steps": 160}
    truth = gradients(RK4(steps=80), problem)
    assert torch.allclose(
        gradients(TorchDiffEq(method, differentiate="adjoint", **control), problem), truth, rtol=0, atol=1e-4
    )
    if method != "scipy_solver":
        assert torch.allclose(gradients(TorchDiffEq(method, **control), problem), truth, rtol=0, atol=1e-4)


def test_levels_have_direct_gradients() -> None:
    latents = torch.rand(1, 2, 3, dtype=torch.float64)
    start = torch.tensor([[0.9, 0.5]], dtype=torch.float64, requires_grad=True)
    for solver in (adaptive(tolerance=1e-9), TorchDiffEq("rk4", steps=50)):
        (found,) = torch.autograd.grad(integrate(riccati, latents, start, 0.1, solver=solver).latents.sum(), start)
        (exact,) = torch.autograd.grad(riccati_solution(latents, start, 0.1).sum(), start)
        assert torch.allclose(found, exact, rtol=0, atol=1e-5)


def test_a_failing_backward_solve_is_told_in_words() -> None:
    class Kink(nn.Module):
        def forward(self, latents: Tensor, level: Tensor) -> Tensor:
            return (latents - latents.detach()).abs().sqrt() - latents.detach()  # its derivative is infinite

    latents = torch.ones(1, 1, 1, requires_grad=True)
    solution = integrate(Kink(), latents, 1.0, 0.0, solver=adaptive(tolerance=1e-3, differentiate="adjoint"))
    with pytest.raises(SolverError, match="backward solve is stuck at levels from 0 to 0"):
        solution.latents.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "runge"}, "no method 'runge'; it has euler, midpoint"),
        ({"method": "dopri5"}, "needs both tolerances.* got rtol=None, atol=None"),
        ({"method": "dopri5", "rtol": 1e-3}, "needs both tolerances"),
        ({"method": "dopri5", "rtol": 1e-3, "atol": 1e-3, "steps": 4}, "chooses its own steps.* got steps=4"),
        ({"method": "dopri5", "rtol": -1.0, "atol": 1e-3}, "finite numbers above 0, got rtol=-1.0"),
        (
            {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3, "step_size": 0.1},
            "no option step_size; it takes dfactor, dtype",
        ),
        ({"method": "dopri5", "rtol": 1e-3, "atol": 1e-3, "norm": max}, "no option norm"),
        ({"method": "rk4", "steps": 4, "rtol": 1e-3, "atol": 1e-3}, "ignores tolerances and takes steps instead"),
        ({"method": "rk4", "steps": 4, "max_order": 3}, "no option max_order; it takes perturb"),
        ({"method": "implicit_adams", "steps": 4, "rtol": 1e-3}, "both tolerances of its corrector or neither"),
        ({"method": "rk4", "steps": 4, "differentiate": "forward"}, 'must be "direct" or "adjoint"'),
        ({"method": ["dopri5"]}, r"no method \['dopri5'\]"),
        ({"method": "dopri5", "rtol": "1e-3", "atol": 1e-3}, "finite numbers above 0, got rtol='1e-3'"),
        ({"method": "dopri5", "rtol": math.inf, "atol": 1e-3}, "finite numbers above 0"),
        ({"method": "dopri5", "rtol": 1e-3, "atol": math.nan}, "finite numbers above 0"),
        ({"method": "explicit_adams", "steps": 4, "max_order": 99}, "max_order to be a whole number from 4 to 12"),
        ({"method": "implicit_adams", "steps": 4, "max_iters": 0}, "max_iters to be a whole number from 1 on"),
        ({"method": "rk4", "steps": 4, "perturb": 1}, "perturb to be True or False, got perturb=1"),
        *(
            ({"method": "dopri5", "rtol": 1e-3, "atol": 1e-3, option: value}, f"dopri5 needs {option} to be")
            for option, value in (
                ("first_step", 0.0),
                ("first_step", -1),
                ("first_step", math.nan),
                ("min_step", -0.1),
                ("max_step", 0),
                ("max_num_steps", 1.5),
                ("safety", 0),
                ("ifactor", 1),
                ("dfactor", 2),
                ("dtype", "float32"),
                ("step_t", 0.5),
                ("jump_t", [0.5, 1.5]),
            )
        ),
        ({"method": "scipy_solver", "rtol": 1e-3, "atol": 1e-3, "solver": "RK5"}, "solver to be one of RK45, RK23"),
    ],
)
def test_arguments_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchDiffEq(**arguments)


@pytest.mark.parametrize(
    ("solver", "call", "error", "message"),
    [
        (TorchDiffEq("rk4"), {}, ValueError, r"how many steps to take: TorchDiffEq\('rk4', steps=...\)"),
        (adaptive(differentiate="adjoint"), {"field": riccati}, TypeError, "an nn.Module.* got function"),
        (adaptive(differentiate="adjoint"), {"callback": print}, ValueError, "takes no callback"),
        (
            adaptive(differentiate="adjoint"),
            {"start": torch.ones(2, requires_grad=True)},
            ValueError,
            "no gradient to levels",
        ),
        (adaptive("scipy_solver"), {"callback": print}, ValueError, "no callback can be called"),
        (adaptive("scipy_solver"), {}, ValueError, "cuts the gradient: use differentiate='adjoint'"),
    ],
)
def test_what_a_method_cannot_do_is_refused(
    solver: TorchDiffEq, call: dict, error: type[Exception], message: str
) -> None:
    call = {"field": Network(), "start": 1.0, "solver": solver, **call}
    with pytest.raises(error, match=message):
        integrate(call.pop("field"), torch.ones(2, 3, 3, dtype=torch.float64), call.pop("start"), 0.1, **call)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-14), (torch.float32, 1e-9), (torch.float64, 1e-20)]
)
@pytest.mark.parametrize("method", ["dopri5", "scipy_solver"])
def test_tolerances_that_a_dtype_cannot_meet_are_refused(method: str, dtype: torch.dtype, tolerance: float) -> None:
    with pytest.raises(ValueError, match=f"too fine for {dtype}: below .* Take wider ones, or float64"):
        integrate(riccati, torch.ones(1, 1, 2, dtype=dtype), 1.0, solver=adaptive(method, tolerance))


@pytest.mark.parametrize("tolerance", [1e-6, 2e-8])
def test_what_float32_can_be_asked_for_ends(tolerance: float) -> None:
    latents = torch.linspace(0.1, 0.9, 6).view(1, 2, 3)
    found = integrate(riccati, latents, 1.0, solver=adaptive(tolerance=tolerance, max_num_steps=200)).latents
    assert torch.allclose(found, riccati_solution(latents, 1.0, 0.0), rtol=0, atol=5e-6)


def test_an_error_that_is_large_but_finite_is_not_called_infinite() -> None:
    problem = check(riccati, torch.ones(1, 2, 3), 1.0, 0.0, callback=None, trajectory=False, watch=False)
    norm = TokenNorm(problem, None)
    assert norm(torch.tensor([[[1e30, -1e30, 1e30], [0.0, 0.0, 0.0]]])) == pytest.approx(1e30)
    assert norm.errors[0, 1] == 0
    assert norm(torch.tensor([[[1.0, math.nan, 1.0], [0.0, 0.0, 0.0]]])) == math.inf


def test_scipy_has_a_trajectory_of_its_ends() -> None:
    with torch.no_grad():
        solution = integrate(
            Network(), torch.ones(1, 2, 3, dtype=torch.float64), 1.0, solver=adaptive("scipy_solver"), trajectory=True
        )
    assert solution.trajectory is not None
    assert solution.trajectory.level[:, 0, 0].tolist() == [1.0, 0.0]


def test_repr_and_with_steps() -> None:
    solver = TorchDiffEq("explicit_adams", steps=3, max_order=4)
    assert repr(solver) == "TorchDiffEq('explicit_adams', steps=3, max_order=4)"
    assert repr(solver.with_steps(7)) == "TorchDiffEq('explicit_adams', steps=7, max_order=4)"
    assert not solver.adaptive
    assert adaptive().adaptive
    assert repr(TorchDiffEq("rk4").with_steps(1)) == "TorchDiffEq('rk4', steps=1)"


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams"])
def test_a_method_that_remembers_takes_no_single_rows(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method} cannot take the rows of a plan: .* ExponentialMultistep"):
        TorchDiffEq(method).with_steps(1)


def test_ranks_agree_on_their_steps_and_fail_together() -> None:
    worker = Path(__file__).with_name("solver_ranks.py")
    done = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
