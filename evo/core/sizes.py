"""What a model of some config is made of, found without building it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo.core.config import EvoConfig

if TYPE_CHECKING:
    from evo.core.model import Evo

_FIRST = "backbone.blocks.0."


def one_block(config: EvoConfig) -> Evo:
    """The model of a config with a single block, on the meta device: all there is to know of its parts, at no cost.

    Raises:
        ValueError: for sizes that do not make a model.
    """
    try:
        with torch.device("meta"):
            return replace(config, depth=1).build()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"a model of this config cannot be: {error}") from error


def blueprint(config: EvoConfig) -> dict[str, Tensor]:
    """The state of a model of this config as tensors without memory, by name. All blocks are made like the first."""
    state = one_block(config).state_dict()
    block = {name.removeprefix(_FIRST): tensor for name, tensor in state.items() if name.startswith(_FIRST)}
    others = {name: tensor for name, tensor in state.items() if not name.startswith(_FIRST)}
    return others | {
        f"backbone.blocks.{index}.{name}": tensor for index in range(config.depth) for name, tensor in block.items()
    }
