"""From context logits to the denoised latent to the vector field.

B batch, N tokens, V vocabulary, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evo.core.answers import described
from evo.core.latent_space import Embeddings, evidence_query, evidence_table
from evo.schedules import Schedule


class Denoised(NamedTuple):
    """What is known of a token from its context and its own noisy latent.

    Attributes:
        log_probs: log p(v|z), (B, N, V), in nats.
        latents: the denoised latent, the mean of e(v) under p(v|z), (B, N, D).
    """

    log_probs: Tensor
    latents: Tensor


class Denoiser:
    """Bayes' rule: p(v|z) = softmax(pi + l), with the evidence l of a latent seen through Gaussian noise.

    The evidence is of known form, so it is added exactly rather than learned. Where the level is below `schedule.t_min` the
    token is realised: its latent is its embedding, and there is nothing to add. All of this is computed in the latents' own
    precision, also under autocast: at low levels l runs to hundreds of nats.

    Args:
        embeddings: e(v), (V, D): a snapshot, so that a loop over solver steps normalises them once.
        schedule: the noise schedule.
    """

    def __init__(self, embeddings: Tensor, schedule: Schedule) -> None:
        self.embeddings, self.schedule = embeddings, schedule
        self._table: Tensor | None = None

    @property
    def table(self) -> Tensor:
        """See `evidence_table`; who only sketches does not need it."""
        # Not a `cached_property`: before Python 3.12 it takes a lock, which torch.compile cannot trace.
        if self._table is None:
            self._table = evidence_table(self.embeddings)
        return self._table

    @classmethod
    def of(cls, latent_space: Embeddings, schedule: Schedule) -> Denoiser:
        """The denoiser of a latent space as it is now.

        Raises:
            ValueError: for a table of another shape than the latent space says.
        """
        embeddings, shape = latent_space.weight, (latent_space.vocab_size, latent_space.dim)
        if embeddings.shape != shape:
            raise ValueError(
                f"the latent space has a weight of shape {tuple(embeddings.shape)}, and vocab_size and dim {shape}; "
                "it needs one row for each entry"
            )
        return cls(embeddings, schedule)

    def log_posterior(self, context_logits: Tensor | None, latents: Tensor, level: Tensor) -> Tensor:
        """Log p(v|z) in nats of latents (B, N, D) at levels (B, N), (B, N, V); without context logits (B, N, V) from the evidence alone."""
        with torch.autocast(latents.device.type, enabled=False):
            query = evidence_query(latents, level, self.schedule).flatten(0, -2)
            table = self.table.to(latents.dtype).T
            if context_logits is None:
                logits = query @ table
            else:
                logits = torch.addmm(context_logits.to(latents.dtype).flatten(0, -2), query, table)
            return logits.log_softmax(-1).unflatten(0, level.shape)

    def __call__(self, context_logits: Tensor, latents: Tensor, level: Tensor) -> Denoised:
        """Context logits (B, N, V), latents (B, N, D), levels (B, N) -> log-posterior and denoised latents."""
        log_probs = self.log_posterior(context_logits, latents, level)
        with torch.autocast(latents.device.type, enabled=False):
            return Denoised(log_probs, log_probs.exp() @ self.embeddings.to(latents.dtype))


@dataclass(frozen=True, eq=False)
class VectorField:
    """F(z, t) = dz/dt, the probability flow of a denoiser, as solvers call it.

    Args:
        network: callable (latents (B, N, D), level (B, N)) -> context logits (B, N, V); where it is self-conditioned, with a third
            argument, an estimate (B, N, D) or None.
        denoiser: turns them into denoised latents.
        self_conditioned: whether the network takes an earlier estimate of the clean latents. As a function of z and t alone, which
            is what a solver needs, the field then makes that estimate itself: two evaluations of the network in one.
    """

    network: Callable[..., Tensor]
    denoiser: Denoiser
    self_conditioned: bool = False

    def denoise(self, latents: Tensor, level: Tensor, estimate: Tensor | None = None) -> Denoised:
        """Log-posterior and denoised latents of (B, N, D) at levels (B, N), given an earlier estimate (B, N, D) or none: one evaluation.

        Raises:
            ValueError: for latents or levels of other shapes.
        """
        dim = self.denoiser.embeddings.shape[1]
        if not isinstance(level, Tensor) or latents.dim() != 3 or latents.shape != (*level.shape, dim):
            raise ValueError(
                f"latents are {described(latents)}, levels {described(level)}; "
                f"this flow needs latents (B, N, {dim}) and a level for each, (B, N)"
            )
        given = (latents, level) if estimate is None else (latents, level, estimate)
        return self.denoiser(self.network(*given), latents, level)

    def velocity(self, denoised: Denoised, latents: Tensor, level: Tensor) -> Tensor:
        """The velocity (B, N, D) that a denoised state implies: s' x + n' (z - s x) / n, and 0 where a token is realised."""
        schedule = self.denoiser.schedule
        noisy = level >= schedule.t_min
        velocity = schedule.velocity_from_denoised(latents, denoised.latents, level.clamp(min=schedule.t_min))
        return torch.where(noisy.unsqueeze(-1), velocity, 0.0)

    def __call__(self, latents: Tensor, level: Tensor) -> Tensor:
        """Latents (B, N, D) at levels (B, N) -> d latents / d level, (B, N, D)."""
        estimate = self.denoise(latents, level).latents if self.self_conditioned else None
        return self.velocity(self.denoise(latents, level, estimate), latents, level)
