"""The explicit midpoint rule."""

from __future__ import annotations

from dataclasses import dataclass

from .runge_kutta import ExplicitRungeKutta


@dataclass(frozen=True, kw_only=True)
class Midpoint(ExplicitRungeKutta):
    """Second order, two evaluations a step: the slope half-way along an Euler step."""

    order = 2
    nodes = (0.0, 1 / 2)
    matrix = ((), (1 / 2,))
    weights = (0.0, 1.0)
