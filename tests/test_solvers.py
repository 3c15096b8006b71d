"""What holds for `integrate` and for the fixed-step solvers, whatever the field."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evo.schedules import Cosine, early_stop
from evo.solvers import (
    RK4,
    Ancestral,
    Euler,
    Exponential,
    ExponentialMultistep,
    FixedStep,
    Heun,
    Midpoint,
    SolverError,
    TorchDiffEq,
    integrate,
)

from .solver_problems import GaussianFlow, MixtureFlow, Spans, order_of, riccati, riccati_solution, spans

RUNGE_KUTTA = [Euler, Heun, Midpoint, RK4]
COSINE = Cosine()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def every_solver(steps: int) -> list:
    return [
        *(solver(steps=steps) for solver in RUNGE_KUTTA),
        Exponential(steps=steps, schedule=COSINE),
        ExponentialMultistep(steps=steps, schedule=COSINE),
        Ancestral(steps=steps, schedule=COSINE, generator=torch.Generator().manual_seed(0), eta=0.0),
        TorchDiffEq("heun3", steps=steps),
        TorchDiffEq("dopri5", rtol=1e-6, atol=1e-6),
    ]


DETERMINISTIC = range(len(every_solver(1)))


@pytest.mark.parametrize("solver", RUNGE_KUTTA)
@given(problem=spans(dim=24))
def test_order_per_token(solver: type[FixedStep], problem: Spans) -> None:
    exact = riccati_solution(problem.latents, problem.start, problem.end)
    order = order_of(lambda steps: solver(steps=steps), riccati, exact, problem, (16, 32, 64, 128))
    assert abs(order - solver.order) < 0.2


@pytest.mark.parametrize("solver", RUNGE_KUTTA)
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.9, 0.2), (0.2, 0.9)])
def test_order_scalar(solver: type[FixedStep], start: float, end: float) -> None:
    latents = torch.linspace(0.1, 0.9, 48, dtype=torch.float64).view(2, 2, 12)
    problem = Spans(latents, start, end)
    exact = riccati_solution(latents, start, end)
    order = order_of(lambda steps: solver(steps=steps), riccati, exact, problem, (16, 32, 64, 128))
    assert abs(order - solver.order) < 0.2


@pytest.mark.parametrize("index", DETERMINISTIC)
@settings(max_examples=8)
@given(problem=spans(low=0.05), steps=st.integers(1, 6))
def test_tokens_solved_together_equal_tokens_solved_alone(index: int, problem: Spans, steps: int) -> None:
    solver, flow = every_solver(steps)[index], GaussianFlow(schedule=COSINE)
    together = integrate(flow, problem.latents, problem.start, problem.end, solver=solver).latents
    for b, i in torch.cartesian_prod(*(torch.arange(n) for n in problem.start.shape)).tolist():
        start, end = problem.start[b, i].item(), problem.end[b, i].item()
        alone = integrate(flow, problem.latents[b : b + 1, i : i + 1], start, end, solver=solver).latents
        tolerance = 1e-12 if isinstance(solver, FixedStep) or not solver.adaptive else 1e-4
        assert torch.allclose(together[b, i], alone[0, 0], rtol=0, atol=tolerance)


def test_all_solvers_agree_as_steps_grow() -> None:
    flow = MixtureFlow(COSINE)
    problem = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    end = torch.tensor([[0.1, 0.3, 0.9]] * 4, dtype=torch.float64)
    truth = integrate(flow, problem, 1.0, end, solver=RK4(steps=400)).latents
    for few, many in zip(every_solver(30), every_solver(200), strict=True):
        errors = [
            (integrate(flow, problem, 1.0, end, solver=s).latents - truth).abs().max().item() for s in (few, many)
        ]
        assert errors[1] < 0.02, many
        assert errors[1] <= errors[0] / 5 or errors[1] < 1e-5, many


def coupled(poison: Tensor) -> object:
    """A field in which every token sees all others, and which knows nothing of the tokens in `poison`, (B, N)."""

    def field(latents: Tensor, level: Tensor) -> Tensor:
        velocity = latents.mean(1, keepdim=True) - latents * level.unsqueeze(-1)
        return torch.where(poison.unsqueeze(-1), float("nan"), velocity)

    return field


@pytest.mark.parametrize("index", DETERMINISTIC)
@settings(max_examples=8)
@given(problem=spans(low=0.05), steps=st.integers(1, 4))
def test_frozen_tokens_come_back_bit_for_bit_and_poison_no_other(index: int, problem: Spans, steps: int) -> None:
    latents = torch.where(problem.latents < 0.2, -0.0, problem.latents)  # −0 + 0·F is +0
    field = coupled(problem.frozen)
    solution = integrate(field, latents, problem.start, problem.end, solver=every_solver(steps)[index])
    bits = solution.latents.view(torch.int64) == latents.view(torch.int64)
    assert bits[problem.frozen].all()
    assert solution.latents.isfinite().all()
    assert torch.equal(solution.level, problem.end)


@pytest.mark.parametrize("index", DETERMINISTIC)
def test_equal_numbers_freeze_every_token(index: int) -> None:
    latents = torch.randn(2, 3, 4)
    poison = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(integrate(coupled(poison), latents, 0.4, 0.4, solver=every_solver(3)[index]).latents, latents)


@pytest.mark.parametrize("index", DETERMINISTIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "start", [0.8, torch.tensor([0.8, 0.5]), torch.linspace(0.4, 0.9, 6).view(2, 3), torch.tensor(0.8)]
)
def test_field_sees_a_level_per_token_within_its_span(index: int, dtype: torch.dtype, start: float | Tensor) -> None:
    low, high = [], []

    def field(latents: Tensor, level: Tensor) -> Tensor:
        assert level.shape == (2, 3)
        assert level.dtype == latents.dtype == dtype
        low.append(level.amin())
        high.append(level.amax())
        return -1e-4 * latents  # slow, which tempts adaptive methods to look far ahead

    integrate(field, torch.ones(2, 3, 4, dtype=dtype), start, 0.3, solver=every_solver(4)[index])
    assert min(low) >= torch.tensor(0.3, dtype=dtype)
    assert max(high) <= torch.as_tensor(start).to(dtype).max()


@pytest.mark.parametrize("index", DETERMINISTIC)
def test_number_sequence_and_token_levels_mean_the_same(index: int) -> None:
    latents = torch.rand(2, 3, 3, dtype=torch.float64)
    solutions = [
        integrate(
            GaussianFlow(schedule=COSINE), latents, start, torch.tensor(0.25), solver=every_solver(3)[index]
        ).latents
        for start in (0.75, torch.full((2,), 0.75), torch.full((2, 3), 0.75))
    ]
    assert torch.equal(solutions[0], solutions[1])
    assert torch.equal(solutions[0], solutions[2])


@pytest.mark.parametrize("solver", [Euler, Heun, RK4])
@given(problem=spans())
def test_step_walks_a_plan_as_integrate_walks_a_span(solver: type[FixedStep], problem: Spans) -> None:
    whole = integrate(riccati, problem.latents, problem.start, problem.end, solver=solver(steps=5)).latents
    latents, state = problem.latents, None
    rows = torch.lerp(problem.start, problem.end, torch.linspace(0, 1, 6, dtype=torch.float64).view(-1, 1, 1))
    for level, next_level in pairwise(rows):
        latents, state = solver().step(riccati, latents, level, next_level, state)
    assert torch.allclose(latents, whole, rtol=0, atol=1e-14)


def test_a_plan_row_of_zeros_and_waits_gives_no_nan() -> None:
    plan = early_stop(torch.tensor([[0.0, 0.05, 0.5, 1.0]], dtype=torch.float64), 8)
    for solver in every_solver(1)[:7]:
        latents, state = torch.ones(1, 4, 3, dtype=torch.float64), None
        for k in range(8):
            level, next_level = plan[:, k], plan[:, k + 1]
            latents, state = solver.step(GaussianFlow(schedule=COSINE), latents, level, next_level, state)
        assert latents.isfinite().all(), solver


@pytest.mark.parametrize("index", [i for i in DETERMINISTIC if i != 6])
def test_status_and_error_name_the_level_at_which_a_token_was_lost(index: int) -> None:
    def field(latents: Tensor, level: Tensor) -> Tensor:
        broken = (level < 0.5) & torch.tensor([[False, True, False]])
        return torch.where(broken.unsqueeze(-1), float("nan"), -latents)

    latents, end = torch.ones(1, 3, 2, dtype=torch.float64), torch.tensor([[0.2, 0.0, 1.0]], dtype=torch.float64)
    solver = every_solver(10)[index]
    with pytest.raises(SolverError, match=r"\(0, 1\) at level 0\.[456]\d*, where the failing step began"):
        integrate(field, latents, 1.0, end, solver=solver)
    solution = integrate(field, latents, 1.0, end, solver=solver, throw=False)
    whole, lost, frozen = solution.status[0]
    assert lost.startswith("Failed in the step that began at level 0.")
    assert whole.startswith("Stopped" if isinstance(solver, TorchDiffEq) and solver.adaptive else "Reached level 0.2")
    assert frozen == "Frozen at level 1, where it starts and ends."
    assert solution.failed_at is not None
    assert solution.failed_at.isnan().tolist() == [[True, False, True]]
    assert 0.39 < solution.failed_at[0, 1] < 0.61  # the row before the first one below 0.5, give or take a stage


def test_latents_that_start_as_nan_are_lost_from_the_start() -> None:
    latents = torch.tensor([[[1.0], [math.nan]]])
    for solver in (Euler(steps=3), TorchDiffEq("dopri5", rtol=1e-3, atol=1e-3)):
        with pytest.raises(SolverError, match=r"\(0, 1\) at level 0.7"):
            integrate(riccati, latents, 0.7, 0.1, solver=solver)
    frozen = integrate(riccati, latents, torch.tensor([[0.7, 0.1]]), 0.1, solver=Euler(steps=3))
    assert frozen.latents[0, 1].isnan().all()


def test_large_but_finite_latents_are_no_failure() -> None:
    latents = torch.full((1, 2, 2), 3e38)  # their sum is infinite
    assert integrate(lambda z, t: -z, latents, 0.0, 0.1, solver=Euler(steps=1)).latents.isfinite().all()


def test_a_failure_that_does_not_repeat_is_still_an_error() -> None:
    answers = iter([math.nan, 1.0])
    with pytest.raises(SolverError, match="not again"):
        integrate(lambda z, t: z * next(answers), torch.ones(1, 1, 1), 1.0, solver=Euler(steps=1))


def test_a_failure_on_one_rank_is_told_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    calls = []
    with pytest.raises(SolverError, match="throw=False to learn where"):
        integrate(lambda z, t: calls.append(1) or z * math.nan, torch.ones(1, 1, 1), 1.0, solver=Euler(steps=3))
    assert len(calls) == 3


@pytest.mark.parametrize("index", DETERMINISTIC)
def test_callback_sees_every_step_and_ends_the_solve(index: int) -> None:
    solver, latents = every_solver(5)[index], torch.ones(1, 2, 3, dtype=torch.float64)
    start = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    seen: list[tuple[int, Tensor, Tensor]] = []

    def watch(step: int, level: Tensor, latents: Tensor) -> None:
        seen.append((step, level, latents))

    flow = GaussianFlow(schedule=COSINE)
    solution = integrate(flow, latents, start, 0.1, solver=solver, callback=watch, trajectory=True)
    assert [step for step, *_ in seen] == list(range(1, len(seen) + 1))
    assert torch.equal(seen[-1][1], solution.level)
    assert torch.equal(seen[-1][2], solution.latents)
    assert solution.trajectory is not None
    assert torch.equal(solution.trajectory.latents, torch.stack([latents, *(z for _, _, z in seen)]))
    assert torch.equal(solution.trajectory.level, torch.stack([start, *(level for _, level, _ in seen)]))

    stopped = integrate(flow, latents, start, 0.1, solver=solver, callback=lambda step, *_: step == 2)
    assert torch.equal(stopped.latents, seen[1][2])
    assert torch.equal(stopped.level, seen[1][1])
    assert stopped.nfe < solution.nfe
    assert stopped.status[0][0].startswith("Stopped at level 0.")


@pytest.mark.parametrize(("solver", "stages"), [(Euler, 1), (Heun, 2), (Midpoint, 2), (RK4, 4)])
@given(problem=spans(), steps=st.integers(1, 6))
def test_nfe_counts_evaluations(solver: type[FixedStep], stages: int, problem: Spans, steps: int) -> None:
    calls = []
    solution = integrate(
        lambda z, t: calls.append(1) or riccati(z, t),
        problem.latents,
        problem.start,
        problem.end,
        solver=solver(steps=steps),
    )
    assert solution.nfe == len(calls) == stages * steps
    assert solution.trajectory is None


@pytest.mark.parametrize("solver", [Midpoint(steps=2), ExponentialMultistep(steps=2, schedule=COSINE)])
@pytest.mark.parametrize("tokenwise", [False, True])
def test_compiles_whole(solver: FixedStep, tokenwise: bool) -> None:
    flow, latents = GaussianFlow(schedule=COSINE), torch.rand(2, 3, 3)
    start = torch.tensor([[0.9, 0.5, 0.2]] * 2) if tokenwise else 0.9

    def solve(latents: Tensor) -> Tensor:
        return integrate(flow, latents, start, 0.2, solver=solver).latents

    torch._dynamo.reset()
    compiled = torch.compile(solve, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(latents), solve(latents), rtol=0, atol=1e-6)


@given(problem=spans())
def test_gradients_reach_latents_and_levels(problem: Spans) -> None:
    latents, start, end = (t.clone().requires_grad_() for t in (problem.latents, problem.start, problem.end))
    found = torch.autograd.grad(
        integrate(riccati, latents, start, end, solver=RK4(steps=40)).latents.sum(), (latents, start, end)
    )
    exact = torch.autograd.grad(riccati_solution(latents, start, end).sum(), (latents, start, end))
    assert torch.allclose(found[0], exact[0], rtol=0, atol=1e-6)
    live = ~problem.frozen
    for level_found, level_exact in zip(found[1:], exact[1:], strict=True):
        assert torch.allclose(level_found[live], level_exact[live], rtol=0, atol=1e-6)
        assert (level_found[problem.frozen] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"latents": torch.ones(2, 3)}, ValueError, r"\(batch, tokens, dim\), .* got shape \(2, 3\)"),
        ({"latents": torch.ones(2, 0, 4)}, ValueError, r"none of them 0, got shape \(2, 0, 4\)"),
        (
            {"latents": torch.ones(2, 3, 4, dtype=torch.bfloat16)},
            TypeError,
            r"float32 or float64 tensor, got torch.bfloat16",
        ),
        ({"latents": torch.ones(2, 3, 4, dtype=torch.float16)}, TypeError, "small steps are lost"),
        ({"latents": [[[1.0]]]}, TypeError, "got list"),
        ({"field": 3}, TypeError, "field must be a callable"),
        ({"start": 1.5}, ValueError, r"start must be a level in \[0, 1\], got 1.5"),
        ({"end": float("nan")}, ValueError, r"end must be a level in \[0, 1\], got nan"),
        ({"start": torch.tensor([[0.5, 0.5, 1.25]] * 2)}, ValueError, r"from 1.25 to 0.0 for token .* \(0, 2\)"),
        ({"end": torch.full((2,), math.nan)}, ValueError, r"levels must lie in \[0, 1\]"),
        ({"start": torch.ones(3)}, ValueError, r"\(2,\) for a level per sequence or \(2, 3\).* got shape \(3,\)"),
        ({"start": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "floating-point levels, got torch.int64"),
        ({"solver": "euler"}, TypeError, "such as Euler"),
        ({"solver": Euler()}, ValueError, r"how many steps to take: Euler\(steps=...\)"),
        ({"field": lambda z, t: z[..., :1]}, ValueError, r"\(2, 3, 4\), got shape \(2, 3, 1\)"),
        ({"field": lambda z, t: z.double()}, TypeError, "must return torch.float32 .* got torch.float64"),
        ({"field": lambda z, t: z.bfloat16()}, TypeError, "convert the velocities back"),
        ({"field": lambda z, t: None}, TypeError, "a tensor of velocities, got NoneType"),
    ],
)
def test_contract(arguments: dict, error: type[Exception], message: str) -> None:
    call = {
        "field": riccati,
        "latents": torch.ones(2, 3, 4),
        "start": 1.0,
        "end": 0.0,
        "solver": Euler(steps=2),
        **arguments,
    }
    with pytest.raises(error, match=message):
        integrate(call.pop("field"), call.pop("latents"), call.pop("start"), call.pop("end"), **call)


@pytest.mark.parametrize("steps", [0, -1, 2.0, "many"])
def test_steps_must_be_a_positive_whole_number(steps: object) -> None:
    with pytest.raises(ValueError, match="whole number of steps"):
        Euler(steps=steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole number of steps"):
        TorchDiffEq("rk4", steps=steps)  # type: ignore[arg-type]
