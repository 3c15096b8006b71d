"""Where a run computes, and how narrowly: chosen by what the hardware can do."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


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


def width(device: torch.device, precision: Precision) -> torch.dtype | None:
    """What passes are cast to: bfloat16 if asked for, or if "auto" and `multiplies_bf16`; else None."""
    narrow = precision == "bf16" or (precision == "auto" and multiplies_bf16(device))
    return torch.bfloat16 if narrow else None


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """A context for the forward pass: autocast to `width`, or nothing."""
    dtype = width(device, precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def peak_flops(device: torch.device, precision: Precision) -> float:
    """Operations a second of a large product of matrices in this precision, the best of a few tries: what utilisation is a share of."""
    side = 512 if device.type == "cpu" else 8192
    left = torch.ones(side, side, device=device, dtype=width(device, precision) or torch.float32)
    best = math.inf
    for _ in range(5):
        begun = time.perf_counter()
        (left @ left)[0, 0].item()  # which waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best
