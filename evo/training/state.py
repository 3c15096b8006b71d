"""All that a step of training changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evo.core import ClockDensity, Evo, EvoConfig, Extremes
from evo.core.composition import composition
from evo.core.serialization import current_config
from evo.training.config import OptimizerConfig
from evo.training.optimizer import Ema, Model, adamw
from evo.training.parallel import unwrapped


@dataclass(kw_only=True)
class TrainState:
    """A model in training, its average, its optimizer and its counts.

    Attributes:
        clock: where the flow is measured.
        extremes: what level 0 and level 1 cost beside the head's levels.
        step: steps made, those left out among them.
        skipped: 0-dim int64 on the model's device: steps left out because loss or gradient was not finite.
        rejected: likewise, how many of them are the latest in a row.
        composition: what the model is made of, by the names of its modules.
        config: that builds such a model; None for one composed by hand.
    """

    model: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    clock: ClockDensity
    extremes: Extremes
    step: int
    skipped: Tensor
    rejected: Tensor
    composition: Mapping[str, str]
    config: EvoConfig | None

    @classmethod
    def begin(
        cls,
        model: Model,
        config: OptimizerConfig,
        *,
        spread: Callable[[Model], nn.Module] = lambda whole: whole,
        optimizer: Callable[[nn.Module, OptimizerConfig], torch.optim.Optimizer] = adamw,
    ) -> TrainState:
        """The state before the first step; `model` is put into training mode, and it and its average are each handed to `spread`."""
        none = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
        ema = Ema(model.train(), config.ema)
        # Of the whole model, since a part of one says less. What is wrapped around a module comes before it, and gives way to it.
        made_of = {_bare(name): what for name, what in composition(model).items()}
        made_by = current_config(model) if isinstance(model, Evo) else None
        called = spread(model)
        spread(ema.model)
        return cls(
            model=called,
            ema=ema,
            optimizer=optimizer(called, config),
            clock=ClockDensity().to(none.device),
            extremes=Extremes().to(none.device),
            step=0,
            skipped=none,
            rejected=none.clone(),
            composition=made_of,
            config=made_by,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies, plain or `DTensor`, by names that no way of running them in parallel changes.

        `model/…`, `ema/…`, `clock/…`, `extremes/…`, and `optimizer/<kind>/<parameter>` of parameters that have had a step.

        Raises:
            TypeError: for an optimizer that remembers anything but tensors.
        """
        parts = {"model": self.model, "ema": self.ema.model, "clock": self.clock, "extremes": self.extremes}
        found = {
            f"{part}/{_bare(name)}": tensor.detach()
            for part, module in parts.items()
            for name, tensor in unwrapped(module).state_dict().items()
        }
        for name, parameter in unwrapped(self.model).named_parameters():
            for kind, tensor in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(tensor, Tensor):
                    raise TypeError(
                        f"{type(self.optimizer).__name__} keeps {kind!r} of a parameter as {type(tensor).__name__}, and a checkpoint "
                        "holds tensors: take an optimizer that keeps tensors"
                    )
                found[f"optimizer/{kind}/{_bare(name)}"] = tensor
        return found

    def begin_moments(self, saved: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Give the optimizer zeros where a state with these names, shapes and types has something, and nothing elsewhere.

        A parameter that has never had a gradient has no moments, and its first step must find it so; this is why the optimizer
        is not stepped to make them, as `torch.distributed.checkpoint.state_dict` does.
        """
        kinds: dict[str, dict[str, str]] = {}
        for key in saved:
            if key.startswith("optimizer/"):
                _, kind, name = key.split("/", 2)
                kinds.setdefault(name, {})[kind] = key
        self.optimizer.state.clear()
        for name, parameter in unwrapped(self.model).named_parameters():
            for kind, key in kinds.get(_bare(name), {}).items():
                shape, dtype = saved[key]
                # Moments lie where their parameter lies, in shards where it does; a count of steps is whole everywhere.
                zeros = (
                    torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
                    if shape == tuple(parameter.shape)
                    else torch.zeros(shape, dtype=dtype, device=parameter.device)
                )
                self.optimizer.state[parameter][kind] = zeros


def _bare(name: str) -> str:
    """A parameter's name without what activation checkpointing and compilation wrap around a module."""
    return ".".join(part for part in name.split(".") if part not in ("_checkpoint_wrapped_module", "_orig_mod"))
