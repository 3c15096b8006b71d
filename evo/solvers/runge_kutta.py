"""Explicit Runge–Kutta methods from their Butcher tableaux."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import FixedStep
from .protocols import Field


@dataclass(frozen=True, kw_only=True)
class ExplicitRungeKutta(FixedStep):
    """An explicit Runge–Kutta method, which is its Butcher tableau (Hairer, Nørsett & Wanner, Solving ODEs I, §II.1).

    Stage i evaluates the field at level + c_i·h, on latents + h·Σ_j a_ij·k_j with j < i; the step is h·Σ_i b_i·k_i.
    """

    nodes: ClassVar[tuple[float, ...]]
    """c, one per stage, the first of them 0."""
    matrix: ClassVar[tuple[tuple[float, ...], ...]]
    """a, with i entries in row i, from 0 on."""
    weights: ClassVar[tuple[float, ...]]
    """b, one per stage."""

    def step(
        self, field: Field, latents: Tensor, level: Tensor, next_level: Tensor, state: None
    ) -> tuple[Tensor, None]:
        """One step, with one evaluation per stage."""
        h = (next_level - level).unsqueeze(-1)
        slopes: list[Tensor] = []
        for node, row in zip(self.nodes, self.matrix, strict=True):
            slopes.append(field(_advance(latents, h, row, slopes), _between(level, next_level, node)))
        return _advance(latents, h, self.weights, slopes), None


def _advance(latents: Tensor, h: Tensor, coefficients: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """The sum latents + h·Σ coefficient·slope, each term one fused operation."""
    for coefficient, slope in zip(coefficients, slopes, strict=True):
        if coefficient:
            latents = torch.addcmul(latents, h, slope, value=coefficient)
    return latents


def _between(level: Tensor, next_level: Tensor, node: float) -> Tensor:
    """The level a share `node` into the step; exact at its ends."""
    if node == 0:
        return level
    return next_level if node == 1 else torch.lerp(level, next_level, node)
