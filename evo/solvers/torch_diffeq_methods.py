"""The methods of torchdiffeq 0.2.5, and what each of them takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_FIXED = frozenset({"perturb"})
_STEP_SIZE = frozenset({"first_step", "min_step", "max_step", "max_num_steps", "safety", "ifactor", "dfactor", "dtype"})


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method is controlled: an adaptive one by both tolerances, any other by a number of steps.

    `corrector` methods take tolerances too, for the iteration inside a step. `options` are the options of torchdiffeq
    that have an effect here: its `step_size` and `grid_constructor` are what `steps` is for, its `norm` is ours, and
    its `interp` acts between steps, where nothing is asked for. `defaults` are ours where torchdiffeq's are not usable.
    A method that is not `observable` lets nobody see its steps. A `multistep` one remembers the steps before.
    """

    adaptive: bool = False
    corrector: bool = False
    observable: bool = True
    multistep: bool = False
    options: frozenset[str] = _FIXED
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def check(
        self, name: str, steps: int | None, rtol: float | None, atol: float | None, options: Mapping[str, Any]
    ) -> None:
        """Raise ValueError for arguments that the method called `name` needs and lacks, does not take, or takes otherwise."""
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
        if any(tolerance is not None and not _is_number(tolerance, above=0) for tolerance in (rtol, atol)):
            raise ValueError(f"tolerances must be finite numbers above 0, got rtol={rtol!r}, atol={atol!r}")
        for option, value in options.items():
            needed, fits = _OPTIONS[option]
            if not fits(value):
                raise ValueError(f"{name} needs {option} to be {needed}, got {option}={value!r}")


def _is_number(x: object, *, above: float, to: float = math.inf) -> bool:
    """Whether x is a finite number in (above, to]."""
    return isinstance(x, int | float) and not isinstance(x, bool) and above < x <= to and x < math.inf


def _is_count(x: object, low: int, high: float = math.inf) -> bool:
    """Whether x is a whole number in [low, high]."""
    return isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def _is_clock(x: Any) -> bool:
    """Whether x is a sequence of numbers in [0, 1]."""
    values = x.tolist() if isinstance(x, torch.Tensor) else x
    return isinstance(values, list | tuple) and all(v == 0 or _is_number(v, above=0, to=1) for v in values)


_SCIPY = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
_TIMES = ("a list of times on the clock, in [0, 1]", _is_clock)
_OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "perturb": ("True or False", lambda x: isinstance(x, bool)),
    "max_order": ("a whole number from 4 to 12", lambda x: _is_count(x, 4, 12)),
    "max_iters": ("a whole number from 1 on", lambda x: _is_count(x, 1)),
    "first_step": ("a length above 0 on the clock, which runs from 0 to 1", lambda x: _is_number(x, above=0, to=1)),
    "min_step": ("a length from 0 to 1 on the clock", lambda x: x == 0 or _is_number(x, above=0, to=1)),
    "max_step": ("a length above 0 on the clock", lambda x: x == math.inf or _is_number(x, above=0)),
    "max_num_steps": ("a whole number from 1 on", lambda x: _is_count(x, 1)),
    "safety": ("a factor in (0, 1]", lambda x: _is_number(x, above=0, to=1)),
    "ifactor": ("a factor above 1", lambda x: _is_number(x, above=1)),
    "dfactor": ("a factor in (0, 1]", lambda x: _is_number(x, above=0, to=1)),
    "dtype": ("torch.float32 or torch.float64", lambda x: x in (torch.float32, torch.float64)),
    "step_t": _TIMES,
    "jump_t": _TIMES,
    "solver": (f"one of {', '.join(_SCIPY)}", lambda x: x in _SCIPY),
}
"""What each option of torchdiffeq must be, in words and as a test."""


_ADAPTIVE = Method(adaptive=True, options=_STEP_SIZE | {"step_t", "jump_t"})
_IMPLICIT_ADAMS = Method(corrector=True, multistep=True, options=_FIXED | {"max_order", "max_iters"})

METHODS = {
    "euler": Method(),
    "midpoint": Method(),
    "heun2": Method(),
    "heun3": Method(),
    "rk4": Method(),
    # The default order of torchdiffeq, 12, is unstable at all but the smallest steps: on dz/dt = −10·z over [0, 0.9]
    # its error grew from 4e3 at 10 steps to 1e77 at 640. With 5 it is the classical fourth-order method.
    "explicit_adams": Method(multistep=True, options=_FIXED | {"max_order"}, defaults={"max_order": 5}),
    "implicit_adams": _IMPLICIT_ADAMS,
    "fixed_adams": _IMPLICIT_ADAMS,
    "adaptive_heun": _ADAPTIVE,
    "fehlberg2": _ADAPTIVE,
    "bosh3": _ADAPTIVE,
    "dopri5": _ADAPTIVE,
    "dopri8": _ADAPTIVE,
    "scipy_solver": Method(adaptive=True, observable=False, options=frozenset({"solver", "min_step", "max_step"})),
}
