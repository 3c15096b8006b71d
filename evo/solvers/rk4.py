"""The classical Runge–Kutta method."""

from __future__ import annotations

from dataclasses import dataclass

from .runge_kutta import ExplicitRungeKutta


@dataclass(frozen=True, kw_only=True)
class RK4(ExplicitRungeKutta):
    """Fourth order, four evaluations a step (Kutta, 1901)."""

    order = 4
    nodes = (0.0, 1 / 2, 1 / 2, 1.0)
    matrix = ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0))
    weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
