"""Sizes: a frozen description of a model, which builds it, and the presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from evo.core.latent_space import LatentSpace
from evo.core.transformer import Transformer
from evo.heads import TimestepHead
from evo.schedules import from_config

if TYPE_CHECKING:
    from evo.core.model import Evo


@dataclass(frozen=True, kw_only=True)
class EvoConfig:
    """Everything that `Evo.from_preset` and a saved `config.json` say of a model.

    Args:
        vocab_size: V.
        width: W, of the hidden states; a multiple of heads.
        depth: number of blocks.
        heads, kv_heads: query heads, and key/value heads (None: as many).
        latent_dim: D; None is width / 2.
        hidden: width of the feed-forward layers; None is 8/3 of the width, rounded up to a multiple of 64.
        context: the longest sequence, in tokens (BOS not counted).
        dropout: on both residual branches.
        rope_base: base of the rotary frequencies.
        radius: of the latent space; None is sqrt(2 ln V).
        schedule: the noise schedule, as its `config()` describes it.
        self_conditioning: let refinement see its own earlier estimate of the clean latents.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    latent_dim: int | None = None
    hidden: int | None = None
    context: int = 4096
    dropout: float = 0.1
    rope_base: float = 10_000.0
    radius: float | None = None
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"name": "cosine"})
    self_conditioning: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1 or not 0 < self.rope_base < float("inf"):
            raise ValueError(
                f"dropout {self.dropout}, rope_base {self.rope_base}: needed dropout in [0, 1), rope_base above 0"
            )

    def build(self) -> Evo:
        """A model of this size with fresh weights."""
        from evo.core.model import Evo

        dim = self.width // 2 if self.latent_dim is None else self.latent_dim
        return Evo(
            latent_space=LatentSpace(self.vocab_size, dim, self.radius),
            backbone=Transformer(
                dim,
                self.width,
                self.depth,
                self.heads,
                kv_heads=self.kv_heads,
                hidden=self.hidden,
                positions=self.context + 1,
                dropout=self.dropout,
                rope_base=self.rope_base,
                self_conditioning=self.self_conditioning,
            ),
            schedule=from_config(self.schedule),
            timestep_head=TimestepHead(self.width),
            config=self,
        )

    def to_json(self) -> dict[str, Any]:
        """A dict that `from_json` turns back into this."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvoConfig:
        """The config of a JSON object.

        Raises:
            ValueError: for an unknown, missing or wrongly typed entry, with its name.
        """
        known = {entry.name: entry for entry in fields(cls)}
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(f"unknown entries {unknown} in a model config; known are {sorted(known)}")
        missing = sorted({"vocab_size", "width", "depth", "heads"} - set(data))
        if missing:
            raise ValueError(f"a model config needs {missing}, which are missing")
        for name, value in data.items():
            _check_type(name, value, str(known[name].type))
        return cls(**data)


def _check_type(name: str, value: object, declared: str) -> None:
    if value is None and "None" in declared:
        return
    if declared.startswith("Mapping"):
        fits = isinstance(value, Mapping)
    elif declared.startswith("bool"):
        fits = isinstance(value, bool)
    elif declared.startswith("int"):
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
    else:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits:
        raise ValueError(
            f"model config entry {name!r} is {value!r}; it should be {declared}, positive where it counts something"
        )


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
