"""Euler's method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import FixedStep
from .protocols import Field


@dataclass(frozen=True, kw_only=True)
class Euler(FixedStep):
    """First order, one evaluation a step: z ← z + h·F(z, τ).

    Written out, where a tableau would do: with a cheap field, walking a tableau of one entry is a tenth of the step.
    """

    order = 1

    def step(
        self, field: Field, latents: Tensor, level: Tensor, next_level: Tensor, state: None
    ) -> tuple[Tensor, None]:
        """One step."""
        return torch.addcmul(latents, (next_level - level).unsqueeze(-1), field(latents, level)), None
