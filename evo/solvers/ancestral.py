"""Ancestral sampling: the stochastic counterpart of the probability flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import FixedStep
from .exponential import coefficients
from .protocols import Field, NoiseSchedule

# Tokens that numbers are drawn for at a time where each sequence draws its own.
_RUN = 64


@dataclass(frozen=True, kw_only=True)
class Ancestral(FixedStep):
    """Part of the noise is drawn anew in every step: z ← s'·x̂ + n'·(√(1 − η²κ²)·ε̂ + η·κ·ξ), κ² = 1 − SNR(τ)/SNR(τ').

    With `eta` 1 this samples q(z_τ' | z_τ, x̂), which walks the reverse-time SDE (DDPM; Song et al. 2021, eq. 12 and
    16); with 0 it is `Exponential`. Its samples have the marginals of the flow as steps → ∞; single paths do not
    converge to anything. Towards higher levels, where nothing can be redrawn, it is
    deterministic. The share redrawn carries no gradient to the levels: at equal levels its derivative is infinite.

    ξ comes from `generator`, which must be on the device of the latents, and from nowhere else: one draw of (B, N, D) a
    step, whatever the levels. With a sequence of B generators, one for each sequence, each draws its own, and what
    becomes of a token does not depend on who else is in the batch, nor in its first step on how many tokens stand
    behind it. Either way they move on, and a second solve draws other numbers: for the same again, seed them again.
    `Evo.generate` and `Evo.edit` bring a stream for each sequence, and need it to be None.

    The field must be a probability flow of `schedule`. Raises ValueError for `eta` outside [0, 1], and in a step for no
    generator, or generators that are not one for each sequence.
    """

    order = 1
    schedule: NoiseSchedule
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is the share of the noise to redraw, from 0 to 1, got {self.eta}")

    def drawing(self, generators: Callable[[], Sequence[torch.Generator]]) -> Ancestral:
        """The same with `generator` replaced."""
        return replace(self, generator=generators())

    def step(
        self, field: Field, latents: Tensor, level: Tensor, next_level: Tensor, state: None
    ) -> tuple[Tensor, None]:
        """One ancestral step."""
        denoised, noise = self.schedule.split_velocity(latents, field(latents, level), level)
        (s, n), (s_next, n_next) = coefficients(self.schedule, level), coefficients(self.schedule, next_level)
        falls = s_next * n > s * n_next  # SNR(τ') > SNR(τ), without dividing by what may be 0
        kept = torch.where(falls, s * n_next / torch.where(falls, s_next * n, 1.0), 1.0).detach()
        drawn = self.eta**2 * (1 - kept) * (1 + kept)
        fresh = self._fresh(latents)
        return s_next * denoised + n_next * ((1 - drawn).sqrt() * noise + drawn.sqrt() * fresh), None

    def _fresh(self, latents: Tensor) -> Tensor:
        """Standard normal noise (B, N, D)."""
        if self.generator is None:
            raise ValueError("Ancestral has no generator: give it one for all sequences, or one for each")
        if isinstance(self.generator, torch.Generator):
            return torch.randn(latents.shape, generator=self.generator, dtype=latents.dtype, device=latents.device)
        if len(self.generator) != len(latents):
            raise ValueError(
                f"Ancestral has {len(self.generator)} generators for {len(latents)} sequences: it needs one for all, or "
                "one for each"
            )
        batch, tokens, dim = latents.shape
        fresh = latents.new_empty(batch, -(-tokens // _RUN) * _RUN, dim)
        for row, generator in zip(fresh, self.generator, strict=True):
            for run in row.split(_RUN):
                run.normal_(generator=generator)
        return fresh[:, :tokens]
