"""The parts that variants are made of and that are nobody else's.

B batch, N tokens, D latent dimension, W width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evo.core import Cache, LatentSpace, Transformer
from evo.schedules import Schedule


class AsTheyAre(LatentSpace):
    """A latent space whose noisy latents a backbone reads as they are, so that nothing is said of their level."""

    def expected(self, latents: Tensor, level: Tensor, schedule: Schedule) -> Tensor:
        return latents


class WithoutTime(nn.Module):
    """A backbone that is not told how noisy its input is: every level it hears is 0, at which a level embedding vanishes."""

    def __init__(self, backbone: Transformer) -> None:
        super().__init__()
        self.backbone = backbone
        self.dim, self.width, self.positions = backbone.dim, backbone.width, backbone.positions
        self.self_conditioned = backbone.self_conditioned

    def forward(self, latents: Tensor, level: Tensor, **options: Any) -> Tensor:
        return self.backbone(latents, torch.zeros_like(level), **options)


class TwoModules(nn.Module):
    """A backbone for the sketch and another for refinement, which share the embeddings alone.

    What is read into a cache is read by both, since a refinement has keys and values of its own of the prompt.
    """

    def __init__(self, sketch: Transformer, refinement: Transformer) -> None:
        super().__init__()
        self.sketch, self.refinement = sketch, refinement
        self.dim, self.width, self.positions = sketch.dim, sketch.width, sketch.positions
        self.self_conditioned = refinement.self_conditioned

    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        *,
        own: Tensor | None = None,
        cache: Cache | None = None,
        store: bool = False,
        **options: Any,
    ) -> Tensor:
        if own is not None:
            return self.refinement(latents, level, own=own, cache=cache, store=store, **options)
        if cache is None:
            return self.sketch(latents, level, **options)
        if store:
            self.refinement(latents, level, cache=_Held(cache), store=True, **options)
        return self.sketch(latents, level, cache=_Behind(cache, len(self.refinement.blocks)), store=store, **options)


class _Held:
    """A cache that takes what is stored without counting it: whoever stores next does."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def advance(self, *_: Any) -> None:
        """Nothing."""


class _Behind:
    """The layers of a cache that lie behind the first few."""

    def __init__(self, cache: Cache, layers: int) -> None:
        self._cache, self._layers_before = cache, layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def read(self, layer: int, *rest: Any, **named: Any) -> Any:
        return self._cache.read(layer + self._layers_before, *rest, **named)

    def write(self, layer: int, *rest: Any, **named: Any) -> Any:
        return self._cache.write(layer + self._layers_before, *rest, **named)

    def join(self, layer: int, *rest: Any, **named: Any) -> Any:
        return self._cache.join(layer + self._layers_before, *rest, **named)


class OwnReadout(nn.Module):
    """Context logits from an output matrix of their own, which shares nothing with the latent space."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocab_size)
        nn.init.normal_(self.linear.weight, std=0.1 * width**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        logits = self.linear(hidden.to(self.linear.weight.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
