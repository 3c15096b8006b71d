"""What solvers cost, and what they give for it.

    python benchmarks/solvers.py [--device cpu] [--compile]

1. Overhead at (8, 256, 64) with a cheap field: `Euler` over a hand-written loop, `TorchDiffEq` over raw torchdiffeq;
   with --compile also compiled against eager.
2. Error against evaluations on a Gaussian mixture under the cosine schedule, up to 64: the table and the figure of
   docs/solvers.md.
3. Beside torchdiffeq and torchode on per-sample spans: error, evaluations, time.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import Comparison, compare, describe_machine, keep_memory, parser, table, write_json
from torch import Tensor
from torchdiffeq import odeint

from evo.schedules import Cosine
from evo.solvers import RK4, Euler, Exponential, ExponentialMultistep, Heun, Midpoint, Solver, TorchDiffEq, integrate
from evo.testing import GaussianMixture

STEPS = 100  # per solve, so that what a solve costs once does not count as a cost per step
BUDGET = 64
START, END = 1.0, 0.1
COSINE = Cosine()


def main() -> None:
    """Measure, print Markdown, write JSON and the figure."""
    options = parser(__doc__ or "", "solvers")
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--compile", action="store_true", help="compile too, which takes a minute")
    options.add_argument("--figure", type=Path, default=Path(__file__).parents[1] / "docs/figures/solvers.png")
    arguments = options.parse_args()
    keep_memory()
    machine = describe_machine(arguments.device)
    print(machine)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Functional iteration did not converge")  # implicit_adams, often
        overhead = measure_overhead(arguments.device, compiled=arguments.compile)
        curves = measure_error(arguments.device)
        beside = measure_beside(arguments.device)
    draw(curves, arguments.figure)
    write_json(arguments.out, {"machine": machine, "overhead": overhead, "error": curves, "beside": beside})


# 1. Overhead


def cheap(latents: Tensor, level: Tensor) -> Tensor:
    return -latents


def measure_overhead(device: torch.device, *, compiled: bool) -> dict[str, Any]:
    latents = torch.randn(8, 256, 64, device=device)
    start = torch.rand(8, 256, device=device) / 2 + 0.5
    level, h = torch.ones(8, 256, device=device), (END - START) / STEPS
    per_token = (END - start) / STEPS

    def loop(step: float | Tensor, scale: float | Tensor) -> Tensor:
        z, t = latents, level
        for _ in range(STEPS):
            z, t = z + scale * cheap(z, t), t + step
        return z

    def fused() -> Tensor:
        z, t = latents, level
        for _ in range(STEPS):
            z, t = torch.add(z, cheap(z, t), alpha=h), t + h
        return z

    def ours(solver: Solver, start: float | Tensor = START) -> Callable[[], Tensor]:
        return lambda: integrate(cheap, latents, start, END, solver=solver).latents

    def theirs(method: str, **options: Any) -> Callable[[], Tensor]:
        times = torch.tensor([START, END], device=device)
        return lambda: odeint(lambda t, z: cheap(z, level), latents, times, method=method, **options)[-1]

    euler, size = Euler(steps=STEPS), {"options": {"step_size": (START - END) / STEPS + 1e-9}}
    pairs = {
        "Euler / loop z = z + h·F": (ours(euler), lambda: loop(h, h)),
        "Euler, a span per token / the same loop": (
            ours(euler, start),
            lambda: loop(per_token, per_token.unsqueeze(-1)),
        ),
        "Euler / loop with one fused operation": (ours(euler), fused),
        'TorchDiffEq("euler") / odeint': (ours(TorchDiffEq("euler", steps=STEPS)), theirs("euler", **size)),
    }
    if compiled:
        pairs["Euler, compiled whole / eager"] = (torch.compile(ours(euler), fullgraph=True), ours(euler))
        pairs["RK4, compiled whole / eager"] = (
            torch.compile(ours(RK4(steps=STEPS)), fullgraph=True),
            ours(RK4(steps=STEPS)),
        )
    found = {name: compare(*pair, device=device) for name, pair in pairs.items()}
    rows = [(name, f"{c.first_ms:.2f}", f"{c.second_ms:.2f}", c) for name, c in found.items()]
    print("\n" + table(("overhead", "first, ms", "second, ms", "ratio, median (p10 to p90)"), rows))
    return {name: vars(c) for name, c in found.items()}


# 2. Error against evaluations


def mixture(device: torch.device) -> GaussianMixture:
    """32 narrow components on the sphere of radius √(2·ln 32) in 16 dimensions, as an embedding of 32 tokens would be."""
    directions = torch.randn(32, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = math.sqrt(2 * math.log(32)) * directions / directions.norm(dim=-1, keepdim=True)
    weights, variances = torch.full((32,), 1 / 32), torch.full((32,), 0.01)
    weights, variances = (t.to(device, torch.float64) for t in (weights, variances))
    return GaussianMixture(schedule=COSINE, weights=weights, means=means.to(device), variances=variances)


def noise(device: torch.device) -> Tensor:
    return torch.randn(8, 32, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def measure_error(device: torch.device) -> dict[str, list[tuple[int, float]]]:
    """For each solver, (evaluations, root-mean-square error of a coordinate)."""
    target, latents = mixture(device), noise(device)
    truth = integrate(target.velocity, latents, START, END, solver=RK4(steps=2000)).latents

    def points(solvers: list[Solver]) -> list[tuple[int, float]]:
        solutions = [integrate(target.velocity, latents, START, END, solver=solver) for solver in solvers]
        found: dict[int, float] = {}
        for solution in solutions:
            if solution.nfe <= BUDGET:
                found[solution.nfe] = min(rms(solution.latents - truth), found.get(solution.nfe, math.inf))
        return sorted(found.items())

    def fixed(make: Callable[[int], Solver]) -> list[tuple[int, float]]:
        return points([make(n) for n in range(1, BUDGET + 1)])

    def adaptive(method: str) -> list[tuple[int, float]]:
        return points([TorchDiffEq(method, rtol=10**-x, atol=10**-x) for x in torch.arange(0, 5, 0.25).tolist()])

    curves = {
        "Euler": fixed(lambda n: Euler(steps=n)),
        "Midpoint": fixed(lambda n: Midpoint(steps=n)),
        "Heun": fixed(lambda n: Heun(steps=n)),
        "RK4": fixed(lambda n: RK4(steps=n)),
        "Exponential": fixed(lambda n: Exponential(steps=n, schedule=COSINE)),
        "ExponentialMultistep": fixed(lambda n: ExponentialMultistep(steps=n, schedule=COSINE)),
        **{
            f'"{m}"': fixed(lambda n, m=m: TorchDiffEq(m, steps=n))
            for m in ("heun3", "explicit_adams", "implicit_adams")
        },
        **{f'"{m}"': adaptive(m) for m in ("adaptive_heun", "bosh3", "dopri5", "dopri8")},
    }
    budgets = (8, 16, 32, 64)
    rows = [
        (f"`{name}`", *(best(curve, budget) for budget in budgets), *(fewest(curve, error) for error in (1e-2, 1e-4)))
        for name, curve in curves.items()
    ]
    header = ("solver", *(f"{b} evaluations" for b in budgets), "fewest for 1e-2", "fewest for 1e-4")
    print("\n" + table(header, rows))
    return curves


def best(curve: list[tuple[int, float]], budget: int) -> str:
    errors = [error for nfe, error in curve if nfe <= budget]
    return f"{min(errors):.1e}" if errors else "—"


def fewest(curve: list[tuple[int, float]], error: float) -> int | str:
    """The least number of evaluations from which on the error stays below `error`."""
    above = max((nfe for nfe, found in curve if found > error), default=0)
    return min((nfe for nfe, _ in curve if nfe > above), default=f"> {BUDGET}")


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, (name, curve) in enumerate(curves.items()):
        line = "-" if index < 6 else "--"
        axes.loglog(*zip(*curve, strict=True), line, marker=".", markersize=4, linewidth=1, label=name)
    axes.set(xlabel="evaluations of the field", ylabel="root-mean-square error", xlim=(2, BUDGET), ylim=(3e-5, 1))
    ticks = [2, 4, 8, 16, 32, 64]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.set_title("Mixture of 32 Gaussians, cosine schedule, from level 1 to 0.1", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\nwrote {path}")


# 3. Beside torchdiffeq and torchode


def measure_beside(device: torch.device, tolerance: float = 1e-4) -> dict[str, dict[str, Any]]:
    """The same 256 tokens, each with a span of its own, solved by dopri5 at the same tolerance in three libraries."""
    target, latents = mixture(device), noise(device)
    generator = torch.Generator().manual_seed(2)
    start = (END + (START - END) * torch.rand(8, 32, generator=generator, dtype=torch.float64)).to(device)
    start[:, 0] = START
    truth = integrate(target.velocity, latents, start, END, solver=RK4(steps=2000)).latents
    evaluations = {"count": 0}

    def field(latents: Tensor, level: Tensor) -> Tensor:
        evaluations["count"] += 1
        return target.velocity(latents, level)

    def ours() -> Tensor:
        return integrate(
            field, latents, start, END, solver=TorchDiffEq("dopri5", rtol=tolerance, atol=tolerance)
        ).latents

    def raw() -> Tensor:
        def slope(u: Tensor, z: Tensor) -> Tensor:
            return field(z, torch.lerp(start, torch.full_like(start, END), u)) * (END - start).unsqueeze(-1)

        times = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
        return odeint(slope, latents, times, method="dopri5", rtol=tolerance, atol=tolerance)[-1]

    runs: dict[str, Callable[[], Tensor]] = {
        'TorchDiffEq("dopri5")': ours,
        "torchdiffeq, written out by hand": raw,
        "RK4(steps=16)": lambda: integrate(field, latents, start, END, solver=RK4(steps=16)).latents,
        "ExponentialMultistep(steps=64)": lambda: (
            integrate(field, latents, start, END, solver=ExponentialMultistep(steps=64, schedule=COSINE)).latents
        ),
    }
    if all(importlib.util.find_spec(name) for name in ("torchode", "torchtyping")):
        runs["torchode, a step size per token"] = with_torchode(field, latents, start, tolerance)
    else:
        print("\ntorchode is not compared with: it is not installed whole (pip install torchode)")

    found = {}
    for name, run in runs.items():
        evaluations["count"] = 0
        error = (run() - truth).square().mean(-1).sqrt()
        count = evaluations["count"]
        cost: Comparison = compare(run, ours, device=device, rounds=12, seconds=0.01)
        found[name] = {"error": rms(error), "worst": error.max().item(), "nfe": count, **vars(cost)}
    header = ("solver", "error", "worst token", "evaluations", "ms", 'time / TorchDiffEq("dopri5")')
    rows = [
        (name, f"{f['error']:.1e}", f"{f['worst']:.1e}", f["nfe"], f"{f['first_ms']:.1f}", f"{f['ratio']:.2f}")
        for name, f in found.items()
    ]
    print("\n" + table(header, rows))
    return found


def with_torchode(field: Callable, latents: Tensor, start: Tensor, tolerance: float) -> Callable[[], Tensor]:
    import torchode

    def flat(t: Tensor, z: Tensor) -> Tensor:
        return field(z.view(latents.shape), t.view(start.shape)).view(z.shape)

    term = torchode.ODETerm(flat)
    controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)
    begin = start.flatten()
    problem = torchode.InitialValueProblem(latents.flatten(0, 1), begin, torch.full_like(begin, END))
    return lambda: solver.solve(problem).ys[:, -1].view(latents.shape)


if __name__ == "__main__":
    main()
