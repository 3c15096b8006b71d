"""Sizes: a frozen description of a model, which builds it, and the presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evo.core import parts
from evo.core.bos import bos_slots
from evo.core.latent_space import LatentSpace
from evo.core.layers import GELU, LayerNorm, RMSNorm, SwiGLU
from evo.core.pretrained import PretrainedVocabulary
from evo.core.rotary import Rotary
from evo.core.transformer import Transformer
from evo.heads import Readout, TimestepHead
from evo.schedules import from_config

if TYPE_CHECKING:
    from evo.core.model import Evo


@dataclass(frozen=True, kw_only=True)
class EvoConfig:
    """Everything that `Evo.from_preset` and a saved `config.json` say of a model.

    Args:
        vocab_size: V.
        width: W, of the hidden states.
        depth: number of blocks.
        heads, kv_heads: query heads, and key/value heads (None: as many).
        head_dim: of each head; None is width / heads, which must then be whole.
        latent_dim: D; None is width / 2, or what a pretrained vocabulary has.
        hidden: width of the feed-forward layers; None is 8/3 of the width, rounded up to a multiple of 64.
        context: the longest sequence, in tokens (BOS not counted).
        dropout: on both residual branches.
        attention_dropout: of attention weights.
        norm, feed_forward: the kinds of these layers.
        rotary: frequencies of rotary positions; None is a learned embedding of each position.
        qkv_bias, out_bias: whether those maps of attention have one.
        qk_norm: whether the heads of queries and keys are normalised.
        bos: "attended" is a learned latent before the first token; "detached", for models that were pretrained without one, is
            a learned hidden state that speaks of the first token and that no token sees.
        pretrained: how a pretrained vocabulary is held; None is a vocabulary of our own, on a sphere.
        readout_bias: whether context logits have a bias for every entry of a vocabulary of our own.
        radius: of the latent space; None is sqrt(2 ln V).
        schedule: the noise schedule, as its `config()` describes it.
        self_conditioning: let refinement see its own earlier estimate of the clean latents.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    latent_dim: int | None = None
    hidden: int | None = None
    context: int = 4096
    dropout: float = 0.1
    attention_dropout: float = 0.0
    norm: RMSNorm | LayerNorm = RMSNorm()
    feed_forward: SwiGLU | GELU = SwiGLU()
    rotary: Rotary | None = Rotary()
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    bos: str = "attended"
    pretrained: PretrainedVocabulary | None = None
    readout_bias: bool = True
    radius: float | None = None
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"name": "cosine"})
    self_conditioning: bool = False

    def __post_init__(self) -> None:
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.pretrained is not None and (self.latent_dim, self.radius) != (None, None):
            raise ValueError(
                f"latent_dim {self.latent_dim}, radius {self.radius}: a pretrained vocabulary has its own; leave both unset"
            )

    def build(self) -> Evo:
        """A model of this size with fresh weights."""
        from evo.core.model import Evo

        embed = readout = None
        if self.pretrained is not None:
            latent_space = self.pretrained.latent_space(self.vocab_size, self.width)
            embed = self.pretrained.embed(self.width)
            readout = self.pretrained.readout(self.vocab_size, self.width)
        else:
            dim = self.width // 2 if self.latent_dim is None else self.latent_dim
            latent_space = LatentSpace(self.vocab_size, dim, self.radius)
            readout = Readout(self.width, dim, self.vocab_size, bias=self.readout_bias)
        return Evo(
            latent_space=latent_space,
            backbone=Transformer(
                latent_space.dim,
                self.width,
                self.depth,
                self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                hidden=self.hidden,
                positions=self.context + bos_slots(self.bos),
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
                norm=self.norm,
                feed_forward=self.feed_forward,
                rotary=self.rotary,
                qkv_bias=self.qkv_bias,
                out_bias=self.out_bias,
                qk_norm=self.qk_norm,
                embed=embed,
                self_conditioning=self.self_conditioning,
            ),
            schedule=from_config(self.schedule),
            timestep_head=TimestepHead(self.width),
            readout=readout,
            bos=self.bos,
            config=self,
        )

    def to_json(self) -> dict[str, Any]:
        """A dict that `from_json` turns back into this."""
        return parts.to_json(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvoConfig:
        """The config of a JSON object.

        Raises:
            ValueError: for an unknown, missing or wrongly typed entry, with its name.
        """
        return parts.from_json(cls, data, "a model config")


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"width": 128, "depth": 4, "heads": 2, "context": 1024, "dropout": 0.0},
    "small": {"width": 512, "depth": 8, "heads": 8, "context": 2048, "dropout": 0.0},
    # S and H are rows of the paper (24 layers, latent 1024, 16 heads; 48 layers, latent 2560, 40 heads), the others lie between.
    "S": {"width": 2048, "depth": 24, "heads": 16},
    "B": {"width": 2560, "depth": 33, "heads": 20},
    "L": {"width": 3328, "depth": 38, "heads": 26},
    "XL": {"width": 4096, "depth": 41, "heads": 32},
    "H": {"width": 5120, "depth": 48, "heads": 40, "kv_heads": 8},
}


def preset(name: str, *, vocab_size: int, **overrides: Any) -> EvoConfig:
    """The config of a named size.

    Raises:
        ValueError: for an unknown name or override, with the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    return EvoConfig.from_json({**PRESETS[name], "vocab_size": vocab_size, **overrides})
