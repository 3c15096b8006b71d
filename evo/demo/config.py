"""What the demonstration can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train a small model on code, measure it, complete held-out functions with four solvers, and draw the levels.

    Everything lands in --out; a second run reuses what is there.
    """

    data: Path | None = None
    """File or folder of text; by default the Python standard library's own source."""
    out: Path = Path("demo")
    """Folder for the model, the picture and the page."""
    minutes: float = 4.5
    """Time to spend on training; the number of steps is chosen to fill it, from the speed of the first few."""
    steps: int | None = None
    """Train for so many steps instead."""
    preset: str = "tiny"
    """Size of the model."""
    prompts: int = 8
    """Held-out functions to complete."""
    new_tokens: int = 96
    """Bytes written behind each."""
    sequences: int = 32
    """Held-out sequences on which the bound is measured."""
    seed: int = 0
    """Of the training and of everything drawn."""

    def __post_init__(self) -> None:
        for name in ("minutes", "prompts", "new_tokens", "sequences"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be positive")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; at least 1 is needed, or None to fill the minutes")
