"""How large a model is, and how it is trained at that size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evo import EvoConfig
from evo.training import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class Size:
    """A width and a depth, and the rate and the tokens of a step that suit them.

    Args:
        width, depth, heads: of the Transformer; the latent dimension is half the width.
        learning_rate: peak of the rate.
        warmup: steps until it is reached.
        step_tokens: tokens of a step, rounded to whole sequences.
    """

    width: int
    depth: int
    heads: int
    learning_rate: float
    warmup: int
    step_tokens: int

    def config(self, vocab_size: int, context: int) -> EvoConfig:
        """The model's."""
        return EvoConfig(
            vocab_size=vocab_size, width=self.width, depth=self.depth, heads=self.heads, context=context, dropout=0.0
        )

    def optimizer(self) -> OptimizerConfig:
        """The optimizer's."""
        return OptimizerConfig(learning_rate=self.learning_rate, warmup=self.warmup, ema=0.999)


SIZES: Mapping[str, Size] = {
    "nano": Size(width=32, depth=2, heads=1, learning_rate=4e-3, warmup=50, step_tokens=1024),
    "micro": Size(width=64, depth=3, heads=2, learning_rate=3e-3, warmup=50, step_tokens=1024),
    "mini": Size(width=128, depth=4, heads=2, learning_rate=2e-3, warmup=100, step_tokens=2048),
    "midi": Size(width=384, depth=8, heads=6, learning_rate=1e-3, warmup=200, step_tokens=16_384),
    "base": Size(width=768, depth=12, heads=12, learning_rate=5e-4, warmup=500, step_tokens=65_536),
}
