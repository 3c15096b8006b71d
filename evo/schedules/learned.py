"""A schedule that trains with the model (the idea is that of Kingma et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .warped import WarpedCosine


class Learned(WarpedCosine):
    """The cosine schedule walked at a learned speed; untrained, it is the cosine schedule.

    Both ends are fixed, exactly the word at 0 and exactly noise at 1: what is learned is how fast the levels between
    are passed, as a smooth curve over `intervals` equal intervals. It is nowhere slower than about 1/100 of the
    cosine's, so that log-SNR stays strictly decreasing and its derivative finite.
    """

    def __init__(self, intervals: int = 32, *, t_min: float = 0.1) -> None:
        """`intervals` ≥ 1; ValueError otherwise."""
        super().__init__(t_min=t_min)
        if intervals < 1:
            raise ValueError(f"intervals = {intervals!r}: needs at least one.")
        self.log_speed = nn.Parameter(torch.zeros(intervals + 2))

    def coefficients(self) -> Tensor:
        return 0.01 + 0.99 * len(self.log_speed) * self.log_speed.softmax(0)

    def config(self) -> dict[str, Any]:
        return super().config() | {"intervals": len(self.log_speed) - 2}
