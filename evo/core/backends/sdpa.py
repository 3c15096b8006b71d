"""`torch.nn.functional.scaled_dot_product_attention`: the reference, on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from evo.core.backends.base import Backend, Call
from evo.core.masks import Piece
from evo.core.pattern import Pattern


@dataclass(frozen=True)
class Sdpa(Backend):
    """PyTorch's own attention, which picks among its kernels.

    A mask of a few pieces is computed piece by piece and needs no matrix: memory is linear in length where the device has a fused
    kernel. Any other mask is a matrix, bool (B or 1, 1, Q, K).
    """

    name: ClassVar[str] = "sdpa"

    def reasons_against(self, call: Call) -> tuple[str, ...]:
        return ()

    def reason_for(self, call: Call) -> str | None:
        return "needs no matrix for this mask" if _usable(call.pattern) else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float = 0.0) -> Tensor:
        pieces = _usable(pattern)
        if q.shape[1] != k.shape[1] and q.device.type != "cpu" and (pieces is None or q.dtype == torch.float32):
            # On accelerators only kernels of half precision without a matrix take groups, and the one that takes everything keeps all
            # logits; copies of the keys are linear in length.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = q.shape[1] != k.shape[1]
        if pieces is None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=pattern.matrix, dropout_p=dropout, enable_gqa=grouped
            )
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, piece.start : piece.stop],
                k[:, :, : piece.keys],
                v[:, :, : piece.keys],
                is_causal=piece.causal,
                dropout_p=dropout,
                enable_gqa=grouped,
            )
            for piece in pieces
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _usable(pattern: Pattern) -> tuple[Piece, ...] | None:
    """The pieces, if every triangle is square: how `is_causal` lies over others is not said alike everywhere."""
    pieces = pattern.pieces
    if pieces is None or any(piece.causal and piece.stop - piece.start != piece.keys for piece in pieces):
        return None
    return pieces
