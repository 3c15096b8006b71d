"""Rotary positions (Su et al. 2021), and how their frequencies are stretched for contexts longer than the pretrained one.

C head dimension, B batch, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEAD_DIM_LIMIT = 1 << 16
"""Dimensions of a head, beyond any there is."""


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by a factor (Chen et al. 2023, position interpolation).

    Args:
        factor: above 0.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self, "factor")

    @property
    def amplitude(self) -> float:
        """1: cosines and sines stay as they are."""
        return 1.0

    def __call__(self, frequencies: Tensor, base: float) -> Tensor:
        """Frequencies (C/2,) in radians a position -> the scaled ones."""
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths divided by a factor, short ones left alone, a ramp between (Llama 3.1, `rope_type` "llama3").

    Args:
        factor: of positions, above 0.
        low_frequency, high_frequency: turns within the original context below which a frequency is divided, and above which it is
            left alone; 0 < low < high.
        original_context: positions of the pretrained model before it was stretched.
    """

    factor: float
    low_frequency: float
    high_frequency: float
    original_context: int

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "low_frequency", "high_frequency", "original_context")
        if self.low_frequency >= self.high_frequency:
            raise ValueError(f"low_frequency {self.low_frequency} must lie below high_frequency {self.high_frequency}")

    @property
    def amplitude(self) -> float:
        """1: cosines and sines stay as they are."""
        return 1.0

    def __call__(self, frequencies: Tensor, base: float) -> Tensor:
        """Frequencies (C/2,) in radians a position -> the scaled ones."""
        turns = self.original_context * frequencies / (2 * math.pi)
        kept = ((turns - self.low_frequency) / (self.high_frequency - self.low_frequency)).clamp(0, 1)
        return torch.lerp(frequencies / self.factor, frequencies, kept)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): interpolation for slow frequencies, none for fast ones, and louder attention.

    Args:
        factor: of positions, above 0.
        original_context: positions of the pretrained model before it was stretched.
        fast, slow: turns within the original context at which the ramp between the two begins and ends (the paper's beta and alpha).
        amplitude: factor on cosines and sines; `attention_amplitude(factor)` is the paper's.
        whole: round the ends of the ramp to whole dimensions.
    """

    factor: float
    original_context: int
    fast: float = 32.0
    slow: float = 1.0
    amplitude: float
    whole: bool = True

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "original_context", "fast", "slow", "amplitude")

    @staticmethod
    def attention_amplitude(factor: float, scale: float = 1.0) -> float:
        """0.1·scale·ln(factor) + 1, the square root of the paper's attention temperature; 1 where nothing is stretched."""
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    def __call__(self, frequencies: Tensor, base: float) -> Tensor:
        """Frequencies (C/2,) in radians a position -> the scaled ones."""
        dim = 2 * len(frequencies)

        def index(turns: float) -> float:
            return dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = index(self.fast), index(self.slow)
        if self.whole:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        steps = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
        divided = ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return torch.lerp(frequencies, frequencies / self.factor, divided)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions: every pair of dimensions i, i + C/2 of a head turns by position · base^(-2i/C).

    Args:
        base: of the geometric row of frequencies, above 1.
        scaling: changes the frequencies for a longer context; None leaves them.
    """

    base: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def __post_init__(self) -> None:
        if not 1 < self.base < math.inf:
            raise ValueError(f"base is {self.base}; rotary frequencies need a finite base above 1")

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians a position, (C/2,) float64 on the CPU."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
        frequencies = self.base**-exponents
        return frequencies if self.scaling is None else self.scaling(frequencies, self.base)


class RotaryTable(nn.Module):
    """Cosines and sines of positions, as `rotate` takes them.

    Frequencies are rounded to float32 for good: a model has the same ones whatever its dtype, under `.double()` too.

    Args:
        rotary: the frequencies.
        head_dim: C, even, at most `HEAD_DIM_LIMIT`.

    Raises:
        ValueError: for any other head_dim.
    """

    frequencies: Tensor

    def __init__(self, rotary: Rotary, head_dim: int) -> None:
        super().__init__()
        # The table is real memory also where a model is only sketched on the meta device, as a config that is not trusted is.
        if head_dim % 2 or not 0 < head_dim <= HEAD_DIM_LIMIT:
            raise ValueError(
                f"head_dim is {head_dim}; rotary positions turn pairs of dimensions: an even number is needed, at most {HEAD_DIM_LIMIT}"
            )
        self.amplitude = 1.0 if rotary.scaling is None else rotary.scaling.amplitude
        self.register_buffer("frequencies", rotary.frequencies(head_dim).float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        # The table goes where the weights go, but keeps its precision: in bfloat16 positions beyond 256 are no longer distinct. It
        # also keeps its values where `fn` makes empty tensors, because no file will bring them.
        kept = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = kept.to(self.frequencies.device)
        return self

    def forward(self, positions: Tensor, angle_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions (B or 1, N) -> cosines and signed sines, (B or 1, 1, N, C) each, in `dtype`; angles in `angle_dtype` or float32."""
        angle_dtype = torch.promote_types(angle_dtype, torch.float32)
        angles = positions.to(angle_dtype).unsqueeze(-1) * self.frequencies.to(angle_dtype)
        cos, sin = (angles.cos() * self.amplitude).unsqueeze(1), (angles.sin() * self.amplitude).unsqueeze(1)
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every pair of dimensions i, i + C/2 of (B, H, N, C) by cosines and signed sines that broadcast to it."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _check_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{type(owner).__name__}: {name} is {value}; it must be positive and finite")
