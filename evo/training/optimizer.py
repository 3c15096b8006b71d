"""AdamW with decay on matrices alone, a rate with warm-up and cosine decay, and the average of the weights."""

from __future__ import annotations

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from evo.training.config import OptimizerConfig

Model = TypeVar("Model", bound=nn.Module)


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters of `model`, whole or in shards: matrices of linear layers, decayed, and all others.

    Embeddings are matrices too but stay undecayed. A latent table is normalised to a fixed radius: decay would not
    shorten its vectors, only lengthen the steps they take, most of all for the rows that batches rarely meet.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    alike: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = {}
    for parameter in trained:
        # One call of the fused kernel takes parameters of one mesh.
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        alike.setdefault((id(parameter) in matrices, mesh), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0}
        for (decayed, _), parameters in sorted(alike.items(), key=lambda group: not group[0][0])
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """One step where the 0-dim bool `finite` holds; otherwise weights, moments and step count stay as they are.

    Fused Adam and AdamW decide on the device, by the `found_inf` that gradient scalers set. Any other optimizer makes the host wait for
    the device.
    """
    # Not fused SGD: with its first step left out, it would go on from a momentum that nobody has set (torch 2.13).
    if isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["fused"]:
        optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    elif finite:
        optimizer.step()


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear up over `warmup`, then half a cosine to the floor, where it stays."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, steps - 1 - config.warmup))
    share = config.floor + (1 - config.floor) * (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * share


class Ema(Generic[Model]):
    """Exponential moving average of a model's parameters, held as a second model in evaluation mode; buffers are the latest.

    Make it of the whole model; where that is then spread over ranks, spread `model` alike.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        """After step `step` (from 0) of `model`: θ̄ ← d·θ̄ + (1 − d)·θ with d = min(decay, (1+step)/(10+step))."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average, latest = ([_own(p) for p in each.parameters()] for each in (self.model, model))
        get_ema_multi_avg_fn(decay)(average, latest, step)
        for mine, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(buffer)


def _own(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
