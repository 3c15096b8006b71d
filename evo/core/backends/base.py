"""What a way to compute attention is, and what it is asked.

B batch, H query heads, G key/value heads, Q queries, K keys, C head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evo.core.pattern import Pattern


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """One call of attention, by all that decides who can serve it: no tensor is looked into.

    Args:
        pattern: who sees whom.
        heads, kv_heads: H and G.
        head_dim: C.
        dtype: of queries, keys and values.
        device: where they are.
        gradient: whether any of them needs one.
        dropout: probability of dropping an attention weight.
        capability: compute capability of a CUDA device, (major, minor); None elsewhere.
    """

    pattern: Pattern
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    gradient: bool = False
    dropout: float = 0.0
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float = 0.0) -> Call:
        """The call that these arguments make."""
        return cls(
            pattern=pattern,
            heads=q.shape[1],
            kv_heads=k.shape[1],
            head_dim=q.shape[3],
            dtype=q.dtype,
            device=q.device,
            gradient=needs_gradient(q, k, v),
            dropout=dropout,
            capability=torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None,
        )


class Backend(ABC):
    """A way to compute attention. Backends are small objects without state, called by every layer with the pattern of the pass."""

    name: ClassVar[str]
    """In explanations and errors."""

    @abstractmethod
    def reasons_against(self, call: Call) -> tuple[str, ...]:
        """Why this call cannot be served, one sentence a reason; empty if it can."""

    @abstractmethod
    def reason_for(self, call: Call) -> str | None:
        """What a call that can be served gains here over the reference; None if nothing."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float = 0.0) -> Tensor:
        """Queries (B, H, Q, C), keys and values (B, G, K, C) -> (B, H, Q, C), for a call that can be served.

        Query heads h·H/G to (h+1)·H/G - 1 share key/value head h. The scale is C^(-1/2). `dropout` drops attention weights.
        """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float = 0.0) -> Tensor:
        """`attend`, after a look at whether it can.

        Raises:
            ValueError: if not, with every reason.
        """
        asked = (self, q.dtype, q.device, q.shape[3], needs_gradient(q, k, v), dropout)
        reasons = pattern.once(asked, lambda: self.reasons_against(Call.of(q, k, v, pattern, dropout)))
        if reasons:
            raise ValueError(
                f"attention backend {self.name} cannot serve this call: {'; '.join(reasons)}. "
                "Give the Transformer another one (attention=auto picks one that can)"
            )
        return self.attend(q, k, v, pattern, dropout)


@dataclass(frozen=True, eq=False)
class Attend:
    """A backend and the pattern of one pass, as the layers are handed them."""

    backend: Backend
    pattern: Pattern

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """As `Backend.attend`."""
        return self.backend(q, k, v, self.pattern, dropout)

    def take(self, rows: slice) -> Attend:
        """The same for these sequences of the batch alone."""
        return Attend(self.backend, self.pattern.take(rows))


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether a gradient will be asked of what is computed from these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
