"""How a broken property is told: which one, at which input, by how much."""

from __future__ import annotations

import torch
from torch import Tensor


class PropertyError(AssertionError):
    """A component lacks a property that the rest of the library relies on."""


def require(claim: str, held: bool, found: str) -> None:
    """Raise PropertyError with `claim` and what was `found` instead, unless `held`."""
    if not held:
        raise PropertyError(f"{claim}: {found}")


def require_all(claim: str, held: Tensor, **inputs: Tensor) -> None:
    """Raise PropertyError at the first element where `held` is false, naming the `inputs` there (broadcast to it)."""
    if not held.all():
        index = int((~held).flatten().to(torch.int8).argmax())
        raise PropertyError(f"{claim}: broken at {_describe(inputs, held.shape, index)}")


def require_equal(claim: str, got: Tensor, want: Tensor, **inputs: Tensor) -> None:
    """Raise PropertyError unless `got` and `want` agree bit for bit."""
    require(claim, got.shape == want.shape, f"shapes {tuple(got.shape)} and {tuple(want.shape)} differ")
    require_close(claim, got, want, 0.0, **inputs)


def require_close(claim: str, got: Tensor, want: Tensor, tolerance: float, **inputs: Tensor) -> None:
    """Raise PropertyError where |got − want| > tolerance·(1 + |want|), at the worst element; NaN is never close."""
    error = (got - want).abs() / (1 + want.abs())
    error = torch.where(got == want, torch.zeros_like(error), error).nan_to_num(nan=torch.inf)
    if not (error <= tolerance).all():
        worst = int(error.flatten().argmax())
        found, needed = (float(x.expand(error.shape).flatten()[worst]) for x in (got, want))
        raise PropertyError(
            f"{claim}: at {_describe(inputs, error.shape, worst)} it is {found:.12g} and should be {needed:.12g}, "
            f"off by {abs(found - needed):.3g}" + (f" (relative tolerance {tolerance:.1g})" if tolerance else "")
        )


def _describe(inputs: dict[str, Tensor], shape: torch.Size, index: int) -> str:
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), shape)) if shape else ()
    values = [f"{name} {float(value.expand(shape)[place]):.12g}" for name, value in inputs.items()]
    return ", ".join([*values, f"index {place}"] if place else values) or "the only element"
