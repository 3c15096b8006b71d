"""The methods of torchdiffeq 0.2.5, and what each of them takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_FIXED = frozenset({"perturb"})
_STEP_SIZE = frozenset({"first_step", "min_step", "max_step", "max_num_steps", "safety", "ifactor", "dfactor", "dtype"})


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method is controlled: an adaptive one by both tolerances, any other by a number of steps.

    `corrector` methods take tolerances too, for the iteration inside a step. `options` are the options of torchdiffeq
    that have an effect here: its `step_size` and `grid_constructor` are what `steps` is for, its `norm` is ours, and
    its `interp` acts between steps, where nothing is asked for. `defaults` are ours where torchdiffeq's are not usable.
    A method that is not `observable` lets nobody see its steps.
    """

    adaptive: bool = False
    corrector: bool = False
    observable: bool = True
    options: frozenset[str] = _FIXED
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def check(
        self, name: str, steps: int | None, rtol: float | None, atol: float | None, options: Iterable[str]
    ) -> None:
        """Raise ValueError for arguments that the method called `name` needs and lacks, or has and does not take."""
        given = f"rtol={rtol}, atol={atol}"
        missing = (rtol is None) + (atol is None)
        if unknown := sorted(set(options) - self.options):
            raise ValueError(f"{name} takes no option {', '.join(unknown)}; it takes {', '.join(sorted(self.options))}")
        if self.adaptive and steps is not None:
            raise ValueError(f"{name} chooses its own steps, by rtol and atol: it takes no steps, got steps={steps}")
        if self.adaptive and missing:
            raise ValueError(f"{name} needs both tolerances, rtol and atol, got {given}")
        if not (self.adaptive or self.corrector) and missing < 2:
            raise ValueError(f"{name} ignores tolerances and takes steps instead, got {given}")
        if self.corrector and missing == 1:
            raise ValueError(f"{name} takes both tolerances of its corrector or neither, got {given}")
        if any(tolerance is not None and not tolerance > 0 for tolerance in (rtol, atol)):
            raise ValueError(f"tolerances must be positive, got {given}")


_ADAPTIVE = Method(adaptive=True, options=_STEP_SIZE | {"step_t", "jump_t"})
_IMPLICIT_ADAMS = Method(corrector=True, options=_FIXED | {"max_order", "max_iters"})

METHODS = {
    "euler": Method(),
    "midpoint": Method(),
    "heun2": Method(),
    "heun3": Method(),
    "rk4": Method(),
    # The default order of torchdiffeq, 12, is unstable at all but the smallest steps: on dz/dt = −10·z over [0, 0.9]
    # its error grew from 4e3 at 10 steps to 1e77 at 640. With 5 it is the classical fourth-order method.
    "explicit_adams": Method(options=_FIXED | {"max_order"}, defaults={"max_order": 5}),
    "implicit_adams": _IMPLICIT_ADAMS,
    "fixed_adams": _IMPLICIT_ADAMS,
    "adaptive_heun": _ADAPTIVE,
    "fehlberg2": _ADAPTIVE,
    "bosh3": _ADAPTIVE,
    "dopri5": _ADAPTIVE,
    "dopri8": _ADAPTIVE,
    "scipy_solver": Method(adaptive=True, observable=False, options=frozenset({"solver", "min_step", "max_step"})),
}
