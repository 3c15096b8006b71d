"""All that a step of training changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evo.training.config import OptimizerConfig
from evo.training.optimizer import Ema, adamw


@dataclass(kw_only=True)
class TrainState:
    """A model in training, its average, its optimizer and its counts.

    Attributes:
        step: steps made, those left out among them.
        skipped: 0-dim int64 on the model's device: steps left out because loss or gradient was not finite.
        rejected: likewise, how many of them are the latest in a row.
    """

    model: nn.Module
    ema: Ema
    optimizer: torch.optim.AdamW
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
            step=0,
            skipped=none,
            rejected=none.clone(),
        )
