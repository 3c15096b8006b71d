"""A model that has read something and can go on.

B batch, P prompt tokens, V vocabulary, D latent dimension, W width.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from evo.core.answers import logits_of
from evo.core.cache import Cache
from evo.core.denoiser import Denoiser, VectorField
from evo.core.masks import Causal, Mask, Window

if TYPE_CHECKING:
    from evo.core.model import Evo


class Prompted:
    """A model that has read something and can go on: the state between two windows.

    `cache` holds BOS (if it is attended) and every token so far, clean; `hidden` (B, 1, W) is the state that speaks of the next token.

    Args:
        model: the model.
        prompt: ids (B, P).
        lengths: (B,) tokens present in each; None is all of P.
        room: tokens that may follow, which the cache will never exceed; None is no limit.
    """

    def __init__(self, model: Evo, prompt: Tensor, lengths: Tensor | None, room: int | None) -> None:
        self.model = model
        self.denoiser = Denoiser.of(model.latent_space, model.schedule)
        size = prompt.shape[1]
        latents = self.denoiser.embeddings[prompt]
        latents, level = model.behind_bos(latents, torch.zeros_like(latents[..., 0]))
        capacity = max(1, latents.shape[1] + (room or 0))
        self.cache = Cache(capacity, None if room is None else capacity)
        self.noise_dtype = torch.promote_types(latents.dtype, torch.float32)
        if not latents.shape[1]:
            self.hidden = model.first_hidden(len(prompt))
            return
        hidden = self._store(latents, level, mask=Causal())
        self.hidden = hidden[:, -1:]
        if lengths is not None and bool((lengths != size).any()):
            # What was read of the padding is taken back; nothing before it saw it.
            self.cache.rewind(size - lengths)
            last = model.bos_slots + lengths - 1
            self.hidden = hidden[torch.arange(len(hidden), device=hidden.device), last.clamp(min=0)].unsqueeze(1)
            if not model.bos_slots:
                empty = (lengths == 0)[:, None, None]
                self.hidden = torch.where(empty, model.first_hidden(len(prompt)), self.hidden)

    def speak(self) -> Tensor:
        """Context logits (B, V) of the next token."""
        return logits_of(self.model.readout, self.hidden, self.denoiser.embeddings)[:, 0]

    def read(self, latents: Tensor, level: Tensor) -> Tensor:
        """Append tokens, as latents (B, n, D) at levels (B, n): hidden states (B, n, W), each of which speaks of the token behind."""
        hidden = self._store(latents, level, mask=Causal())
        self.hidden = hidden[:, -1:]
        return hidden

    def look_ahead(self, latents: Tensor, level: Tensor, noise: Tensor, mask: Mask) -> Tensor:
        """Append tokens (n may be 0), and see in the same pass k places behind them of which nothing is known.

        Such a place enters at level 1, as the schedule's noise there, and speaks of its own token. Nothing of it is kept.

        Args:
            noise: standard normal, (B, k, D).
            mask: who sees whom; under `Causal()` a place sees those before it, under a `Window` that begins with the places all of them.

        Returns:
            Hidden states of the places, (B, k, W).
        """
        count, ahead = latents.shape[1], noise.shape[1]
        pure = self.model.schedule.noise(torch.ones_like(noise[..., :1])) * noise
        own = torch.arange(count + ahead, device=noise.device) >= count
        hidden = self._store(torch.cat([latents, pure], 1), F.pad(level, (0, ahead), value=1.0), mask=mask, own=own)
        self.cache.rewind(ahead)
        if count:
            self.hidden = hidden[:, count - 1 : count]
        return hidden[:, count:]

    def forget(self, count: int | Tensor) -> None:
        """Take back the last `count` tokens, int or (B,); something must be read before the next token is spoken of."""
        self.cache.rewind(count)

    def take(self, rows: Tensor) -> Prompted:
        """Another, with a cache of its own, of these sequences in this order: int64 (R,), R at least 1."""
        taken = copy.copy(self)
        taken.cache, taken.hidden = self.cache.take(rows), self.hidden[rows]
        return taken

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order: int64 (R,), R at least 1."""
        self.cache.select(rows)
        self.hidden = self.hidden[rows]

    def field(self, length: Tensor | None = None) -> VectorField:
        """The flow of a window behind what has been read. `length` (B,) is how many of its tokens are present; None is all."""
        # Whoever asks stands in the window, so that nothing is prompt to them.
        mask, cache = Window(0, None if length is None else self.cache.lengths + length), self.cache

        def network(latents: Tensor, level: Tensor, estimate: Tensor | None = None) -> Tensor:
            own = torch.ones(latents.shape[1], dtype=torch.bool, device=latents.device)
            hidden = self.model.hidden_states(latents, level, mask=mask, own=own, estimate=estimate, cache=cache)
            return logits_of(self.model.readout, hidden, self.denoiser.embeddings)

        return VectorField(network, self.denoiser, self.model.self_conditioned)

    def _store(self, latents: Tensor, level: Tensor, *, mask: Mask, own: Tensor | None = None) -> Tensor:
        before, count = self.cache.length, latents.shape[1]
        hidden = self.model.hidden_states(latents, level, mask=mask, own=own, cache=self.cache, store=True)
        if self.cache.length != before + count:
            raise ValueError(
                f"the backbone was asked to store {count} tokens and stored {self.cache.length - before}: with `store` it needs "
                "`cache.write` in every layer and `cache.advance` behind the last; `evo.testing.check_backbone` tells more"
            )
        return hidden
