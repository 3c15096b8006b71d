"""Heun's method, the explicit trapezoidal rule."""

from __future__ import annotations

from dataclasses import dataclass

from .runge_kutta import ExplicitRungeKutta


@dataclass(frozen=True, kw_only=True)
class Heun(ExplicitRungeKutta):
    """Second order, two evaluations a step: the mean of the slopes at the two ends of an Euler step."""

    order = 2
    nodes = (0.0, 1.0)
    matrix = ((), (1.0,))
    weights = (1 / 2, 1 / 2)
