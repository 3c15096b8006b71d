"""A planted error in a backbone, a latent space or a head of a composed model is caught by `evo.testing`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evo.core import Embeddings, LatentSpace, Transformer
from evo.testing import PropertyError, check_backbone, check_latent_space, check_model_limits
from tests.conftest import random_model


class Foresees(Transformer):
    """A row sees the hidden state of the next, where its level is above 0."""

    def forward(self, latents: Tensor, level: Tensor, **options: Any) -> Tensor:
        hidden = super().forward(latents, level, **options)
        return hidden + torch.where(level > 0, 1.0, 0.0)[..., None] * hidden.roll(-1, 1)


class ForeseesLevels(Transformer):
    def forward(self, latents: Tensor, level: Tensor, **options: Any) -> Tensor:
        return super().forward(latents, level.mean(1, keepdim=True).expand_as(level), **options)


class MixesTheBatch(Transformer):
    def forward(self, latents: Tensor, level: Tensor, **options: Any) -> Tensor:
        hidden = super().forward(latents, level, **options)
        return hidden + hidden.mean(0, keepdim=True)


class IgnoresPositions(Transformer):
    def forward(self, latents: Tensor, level: Tensor, *, positions: Tensor | None = None, **options: Any) -> Tensor:
        return super().forward(latents, level, **options)


class IgnoresOwn(Transformer):
    def forward(self, latents: Tensor, level: Tensor, *, own: Tensor | None = None, **options: Any) -> Tensor:
        return super().forward(latents, level, **options)


class IgnoresMask(Transformer):
    def forward(self, latents: Tensor, level: Tensor, *, mask: Any = None, **options: Any) -> Tensor:
        return super().forward(latents, level, **options)


class IgnoresCache(Transformer):
    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        *,
        cache: Any = None,
        store: bool = False,
        packing: Any = None,
        **options: Any,
    ) -> Tensor:
        return super().forward(latents, level, **options)


class IgnoresPacking(Transformer):
    def forward(self, latents: Tensor, level: Tensor, *, packing: Any = None, **options: Any) -> Tensor:
        if packing is None:
            return super().forward(latents, level, **options)
        return super().forward(latents, level, own=options["own"])


class MisplacesPacked(Transformer):
    def forward(self, latents: Tensor, level: Tensor, *, packing: Any = None, **options: Any) -> Tensor:
        if packing is not None:
            options["positions"] = torch.zeros_like(packing.slots)[None]
        return super().forward(latents, level, packing=packing, **options)


class StoresWhatItIsNotAsked(Transformer):
    def forward(
        self, latents: Tensor, level: Tensor, *, cache: Any = None, store: bool = False, **options: Any
    ) -> Tensor:
        store = cache is not None and options.get("packing") is None
        return super().forward(latents, level, cache=cache, store=store, **options)


class LosesTheGradient(Transformer):
    def forward(self, latents: Tensor, level: Tensor, *, cache: Any = None, **options: Any) -> Tensor:
        return super().forward(
            latents if cache is None else latents.detach() * 1.0 + 0 * latents, level, cache=cache, **options
        )


class IgnoresEstimate(Transformer):
    def forward(self, latents: Tensor, level: Tensor, *, estimate: Tensor | None = None, **options: Any) -> Tensor:
        return super().forward(latents, level, **options)


def transformer(kind: type[Transformer] = Transformer, **options: Any) -> Transformer:
    torch.manual_seed(0)
    return kind(4, 16, 2, 2, positions=12, **options)


@pytest.mark.parametrize("options", [{}, {"self_conditioning": True}, {"rotary": None}, {"qk_norm": True}], ids=str)
def test_our_backbone_passes(options: dict[str, Any]) -> None:
    check_backbone(transformer(**options))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Foresees, "under a causal mask the rows before"),
        (ForeseesLevels, "under a causal mask the rows before"),
        (MixesTheBatch, "a sequence alone is that sequence in a batch"),
        (IgnoresPositions, "a document behind another, at `positions` of its own"),
        (IgnoresOwn, "speaks of its own token differs"),
        (IgnoresMask, "a window sees what stands behind in it"),
        (IgnoresCache, "asked to store 3 tokens, it stored 0"),
        (IgnoresPacking, "packed tokens"),
        (MisplacesPacked, "packed tokens"),
        (StoresWhatItIsNotAsked, "again and again"),
        (LosesTheGradient, "the gradient of a window"),
    ],
)
def test_a_wrong_backbone_is_caught_alone_and_in_a_model(kind: type[Transformer], message: str) -> None:
    with pytest.raises(PropertyError, match=message):
        check_backbone(transformer(kind))
    model = random_model()
    model.backbone.__class__ = kind
    with pytest.raises((PropertyError, ValueError)):
        check_model_limits(model)


def test_a_backbone_that_takes_no_estimate_is_caught() -> None:
    with pytest.raises(PropertyError, match="takes `estimate` in"):
        check_backbone(transformer(IgnoresEstimate, self_conditioning=True))


def test_what_is_no_backbone_is_said_to_be_none() -> None:
    with pytest.raises(PropertyError, match="a backbone has `dim`, int: Linear has None"):
        check_backbone(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="batch 1 and 12 positions"):
        check_backbone(transformer(), batch=1)


def test_a_sketch_that_leaks_above_level_0_is_caught() -> None:
    model = random_model()
    model.backbone.__class__ = Foresees
    with pytest.raises(PropertyError, match="at any levels the sketch of token"):
        check_model_limits(model)


def test_a_trained_self_conditioned_model_passes() -> None:
    model = random_model(self_conditioning=True)
    with torch.no_grad():
        model.backbone.estimate_embed.weight.normal_()
    check_model_limits(model)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda hidden, logits: logits[..., :1].sigmoid(), r"one level per token: needed \(3, 7\), got \(3, 7, 1\)"),
        (lambda hidden, logits: logits.sigmoid().mean((1, 2)), r"one level per token: needed \(3, 7\), got \(3,\)"),
        (lambda hidden, logits: 0.5, r"got float"),
        (lambda hidden, logits: logits[..., 0] * torch.nan, r"lies in \[0, 1\]"),
        (lambda hidden, logits: 3 + logits[..., 0].sigmoid(), r"lies in \[0, 1\]"),
    ],
)
def test_a_wrong_head_of_a_model_is_caught(head: Any, message: str) -> None:
    model = random_model()
    del model.timestep_head
    model.timestep_head = head
    with pytest.raises(PropertyError, match=message):
        check_model_limits(model)


class Table(Embeddings):
    """Entries that stay as they are."""

    def __init__(self, table: Tensor, *, buffer: bool = True, radius: float | None = None) -> None:
        super().__init__(*table.shape, radius=radius)
        if buffer:
            self.register_buffer("table", table)
        else:
            self.table = table

    @property
    def weight(self) -> Tensor:
        return self.table

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


class Shifted(Table):
    def embed(self, tokens: Tensor) -> Tensor:
        return self.table[tokens - 1]


class Short(Table):
    @property
    def weight(self) -> Tensor:
        return self.table[:-2]


def test_our_latent_spaces_pass() -> None:
    check_latent_space(LatentSpace(20, 8))
    check_latent_space(Table(torch.eye(20), radius=1.0))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Table(torch.eye(9), buffer=False, radius=1.0), "register_buffer"),
        (Table(torch.eye(9) * torch.nan), "weight is finite"),
        (Table(torch.eye(9)[[0, 0, 1, 2]], radius=1.0), "no two entries are one"),
        (Table(torch.eye(9), radius=30.0), r"set `radius` to 1"),
        (Shifted(torch.eye(9), radius=1.0), "embed gives rows of weight"),
        (Short(torch.eye(9), radius=1.0), r"weight is \(V, D\): needed \(9, 9\), got \(7, 9\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_latent_space_is_caught(space: Embeddings, message: str) -> None:
    with pytest.raises(PropertyError, match=message):
        check_latent_space(space)
