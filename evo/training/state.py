"""All that a step of training changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evo.core import ClockDensity, Extremes
from evo.training.config import OptimizerConfig
from evo.training.optimizer import Ema, adamw


@dataclass(kw_only=True)
class TrainState:
    """A model in training, its average, its optimizer and its counts.

    Attributes:
        clock: where the flow is measured.
        extremes: what level 0 and level 1 cost beside the head's levels.
        step: steps made, those left out among them.
        skipped: 0-dim int64 on the model's device: steps left out because loss or gradient was not finite.
        rejected: likewise, how many of them are the latest in a row.
    """

    model: nn.Module
    ema: Ema
    optimizer: torch.optim.AdamW
    clock: ClockDensity
    extremes: Extremes
    step: int
    skipped: Tensor
    rejected: Tensor

    @classmethod
    def begin(cls, model: nn.Module, config: OptimizerConfig) -> TrainState:
        """The state before the first step; `model` is put into training mode."""
        none = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
        model.train()
        return cls(
            model=model,
            ema=Ema(model, config.ema),
            optimizer=adamw(model, config),
            clock=ClockDensity().to(none.device),
            extremes=Extremes().to(none.device),
            step=0,
            skipped=none,
            rejected=none.clone(),
        )
