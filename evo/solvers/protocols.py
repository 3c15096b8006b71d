"""What a solver is given: a vector field, and for some methods a noise schedule. Any object of these shapes will do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
"""`field(latents (B, N, D), level (B, N)) -> d latents / d level (B, N, D)`, of the dtype and device of the latents."""

Callback = Callable[[int, Tensor, Tensor], object]
"""`callback(step, level (B, N), latents (B, N, D))`, called after every step, from 1 on; if true, the solve ends."""


class NoiseSchedule(Protocol):
    """What solvers use of a noise schedule: z = signal·x̂ + noise·ε̂ at a level, elementwise on levels (B, N)."""

    def signal(self, t: Tensor) -> Tensor:
        """s(t)."""
        ...

    def noise(self, t: Tensor) -> Tensor:
        """n(t)."""
        ...

    def split_velocity(self, latents: Tensor, velocity: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The denoised latents x̂ and the noise ε̂, both (B, N, D), that `latents` and `velocity` are made of."""
        ...
