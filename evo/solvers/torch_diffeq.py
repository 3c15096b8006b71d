"""Every method of torchdiffeq, on per-token spans."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .base import Solver, check_steps
from .contract import Problem
from .solution import Solution
from .torch_diffeq_flow import Ended, Flow, ObservedFlow
from .torch_diffeq_methods import METHODS, Method
from .torch_diffeq_norm import TokenNorm


@dataclass(frozen=True, init=False, eq=False)
class TorchDiffEq(Solver):
    """A method of torchdiffeq (Chen 2018), by its name there.

    Fixed-step methods ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams" or its other
    name "fixed_adams") take `steps`, and exactly that many are made. "implicit_adams" alone takes tolerances too, those
    of its corrector iteration, 1e-3 and 1e-4 unless given. Adaptive methods ("dopri5", "dopri8", "bosh3", "fehlberg2",
    "adaptive_heun", "scipy_solver") need both tolerances, `rtol` and `atol`, and take no `steps`. `options` are
    torchdiffeq's own for the method; lengths and times among them are on the clock, which runs from 0 to 1.

    Tokens share the clock and hence the steps. The error of a step is that of the worst live token, and of the worst
    rank of the process group `group` (None: all ranks) where torch.distributed runs: every rank of it must then solve.
    The steps end exactly at level `end`, and the field is never asked about levels beyond. "scipy_solver" works on the
    CPU, keeps its own norm over all elements, and has neither callbacks nor a trajectory between its ends.

    `differentiate`: "direct" backpropagates through the steps; "adjoint" solves backwards instead, in memory that does
    not grow with their number (Chen et al. 2018). It needs a field that is an nn.Module, gives gradients to its
    parameters and to `latents` alone (not to levels or to tensors that the field holds otherwise, nor through a
    trajectory), takes no callback, and does not work over sharded parameters.

    Raises ValueError for an unknown method or option, for an option's value that it cannot use, and for steps or
    tolerances that are missing or not its own; in `integrate` for tolerances that the dtype of the latents cannot meet. Where
    a solve must end in any case, give `max_num_steps`.
    """

    method: str
    steps: int | None
    rtol: float | None
    atol: float | None
    differentiate: Literal["direct", "adjoint"]
    group: dist.ProcessGroup | None
    options: Mapping[str, Any]

    def __init__(
        self,
        method: str,
        *,
        steps: int | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        differentiate: Literal["direct", "adjoint"] = "direct",
        group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        for name, value in (
            ("method", method),
            ("steps", steps),
            ("rtol", rtol),
            ("atol", atol),
            ("differentiate", differentiate),
            ("group", group),
            ("options", MappingProxyType(options)),
        ):
            object.__setattr__(self, name, value)
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(f"torchdiffeq has no method {method!r}; it has {', '.join(METHODS)}")
        check_steps(method, steps)
        METHODS[method].check(method, steps, rtol, atol, options)
        if differentiate not in ("direct", "adjoint"):
            raise ValueError(f'differentiate must be "direct" or "adjoint", got {differentiate!r}')

    def __repr__(self) -> str:
        return f"TorchDiffEq({self.method!r}{''.join(f', {k}={v!r}' for k, v in self._arguments().items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Made again from its arguments: what keeps the options from being changed can be neither pickled nor copied.
        return partial(TorchDiffEq, **self._arguments()), (self.method,)

    def _arguments(self) -> dict[str, Any]:
        named = {"steps": self.steps, "rtol": self.rtol, "atol": self.atol, "group": self.group}
        differentiate = {"differentiate": self.differentiate} if self.differentiate != "direct" else {}
        return {**{k: v for k, v in named.items() if v is not None}, **differentiate, **self.options}

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return METHODS[self.method].adaptive

    def with_steps(self, steps: int) -> TorchDiffEq:
        """The same fixed-step method with another number of steps: with one, it takes a row of a plan.

        Raises ValueError for one step of a multistep method, which is begun anew at every row and has no past there.
        """
        if steps == 1 and METHODS[self.method].multistep:
            raise ValueError(
                f"{self.method} cannot take the rows of a plan: torchdiffeq begins it anew at each, and its first steps "
                'are those of rk4. Take TorchDiffEq("rk4"), which is the same, or ExponentialMultistep, which remembers'
            )
        return TorchDiffEq(self.method, **{**self._arguments(), "steps": steps})

    def solve(self, problem: Problem) -> Solution:
        """Hand the problem to torchdiffeq. Not for torch.compile, which odeint only slows down: compile the field."""
        from torchdiffeq import odeint, odeint_adjoint  # here, because it imports SciPy, which takes most of a second

        method = METHODS[self.method]
        self._check_problem(method, problem)
        latents, norm = problem.latents, TokenNorm(problem, self.group)
        flow = self._flow(method, problem, norm)
        options = self._torchdiffeq_options(method, norm)
        solve, arguments = odeint, {"method": self.method, "options": options}
        if method.adaptive or method.corrector:
            arguments["rtol"] = 1e-3 if self.rtol is None else self.rtol
            arguments["atol"] = 1e-4 if self.atol is None else self.atol
        if self.differentiate == "adjoint":
            solve, parameters = odeint_adjoint, cast(nn.Module, problem.field).parameters()
            arguments["adjoint_params"] = tuple(p for p in parameters if p.requires_grad)
            arguments["adjoint_options"] = {**options, "norm": norm.adjoint}
        times = torch.tensor([0.0, 1.0], dtype=latents.dtype, device=latents.device)
        try:
            with warnings.catch_warnings():
                # torchdiffeq passes SciPy's solvers a least step, which most of them say they ignore.
                warnings.filterwarnings("ignore", message="The following arguments have no")
                states: Any = solve(flow, latents, times, **arguments)
            if len(states) < len(times):
                flow.fail_all("SciPy gave up on the way, and torchdiffeq does not tell where")
            flow.record.arrive(states[-1], problem.end)
        except Ended:
            pass
        return flow.record.solution(flow.velocity.nfe)

    def _flow(self, method: Method, problem: Problem, norm: TokenNorm) -> Flow:
        if not method.observable:
            return Flow(problem, check_slopes=True)
        if method.adaptive:
            return ObservedFlow(problem, norm, self.options.get("max_num_steps", math.inf))
        if problem.callback is not None or problem.trajectory or problem.watch:
            return ObservedFlow(problem)
        return Flow(problem)

    def _torchdiffeq_options(self, method: Method, norm: TokenNorm) -> dict[str, Any]:
        options = {**method.defaults, **self.options}
        if not method.adaptive:
            # Alone, times [0, 1] would be a single step; as times, the whole grid would be kept.
            return {**options, "grid_constructor": lambda _field, _latents, times: _grid(times, self.steps)}
        if not method.observable:
            return options
        options.pop("max_num_steps", None)  # counted by the flow, which can say what happened
        # Without these the last step would pass the end of the span, forwards and backwards, and be interpolated.
        options["step_t"] = torch.tensor([0.0, 1.0, *options.get("step_t", ())], dtype=torch.float64)
        if "jump_t" in options:
            options["jump_t"] = torch.as_tensor(options["jump_t"], dtype=torch.float64)
        return {**options, "norm": norm}

    def _check_problem(self, method: Method, problem: Problem) -> None:
        """Raise ValueError or TypeError for what this method cannot do with this problem."""
        if not method.adaptive and self.steps is None:
            raise ValueError(f"integrate needs to know how many steps to take: TorchDiffEq({self.method!r}, steps=...)")
        # The error of a step is known to a share of the rounding of its latents: a tenth of that can still be met.
        finest = torch.finfo(problem.latents.dtype).eps / 10
        if method.adaptive and self.rtol is not None and self.atol is not None and max(self.rtol, self.atol) < finest:
            raise ValueError(
                f"rtol={self.rtol}, atol={self.atol} are too fine for {problem.latents.dtype}: below {finest:.0e} no step "
                f"is short enough, and below {100 * finest:.0e} nothing is gained. Take wider ones, or float64"
            )
        if not method.observable and problem.callback is not None:
            raise ValueError(f"{self.method} tells of no step on its way, so that no callback can be called")
        if self.differentiate == "direct":
            if not method.observable and torch.is_grad_enabled() and _needs_gradient(problem):
                raise ValueError(
                    f"{self.method} cuts the gradient: use differentiate='adjoint', or torch.no_grad() if you need none"
                )
            return
        if not isinstance(problem.field, nn.Module):
            raise TypeError(
                f"differentiate='adjoint' needs a field that is an nn.Module, whose parameters can be found, "
                f"got {type(problem.field).__name__}"
            )
        if problem.callback is not None:
            raise ValueError(
                "differentiate='adjoint' takes no callback: a solve that ends early would lose its gradient"
            )
        if problem.start.requires_grad or problem.end.requires_grad:
            raise ValueError("differentiate='adjoint' gives no gradient to levels: detach them, or use 'direct'")


def _needs_gradient(problem: Problem) -> bool:
    parameters = problem.field.parameters() if isinstance(problem.field, nn.Module) else ()
    return problem.latents.requires_grad or any(p.requires_grad for p in parameters)


def _grid(times: Tensor, steps: int | None) -> Tensor:
    """The ends of `steps` equal steps, in the direction of `times`."""
    assert steps is not None  # _check_problem
    return torch.lerp(times[0], times[-1], torch.linspace(0, 1, steps + 1, dtype=times.dtype, device=times.device))
