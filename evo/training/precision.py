"""Where a run computes, and how narrowly: chosen by what the hardware can do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is an accelerator where there is one. Raises `ValueError` for one not there."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); try --device auto or cpu") from error


def multiplies_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32 on `device`: tensor cores, or AMX tiles on a CPU."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> AbstractContextManager:
    """A context for the forward pass: bf16 autocast if asked for, or if "auto" and `multiplies_bf16`."""
    if precision == "bf16" or (precision == "auto" and multiplies_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
