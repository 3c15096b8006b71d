"""FlexAttention: any mask, compiled into a kernel that skips the blocks in which nobody sees anybody (Dong et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from evo.core.backends.base import Backend, Call
from evo.core.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Callable

# Below so many pairs of query and key the block mask costs more than it saves.
_WORTH_A_BLOCK_MASK = 1 << 20


@dataclass(frozen=True)
class Flex(Backend):
    """FlexAttention. On CUDA it is compiled at its first use (seconds); on a CPU it runs unfused, forward only."""

    name: ClassVar[str] = "flex"

    def reasons_against(self, call: Call) -> tuple[str, ...]:
        kind = call.device.type
        found = []
        if kind not in ("cuda", "cpu"):
            found.append(f"it runs on cuda and, forward only, on cpu, not on {kind}")
        if kind == "cpu" and call.gradient:
            found.append("it has no backward on cpu")
        if kind == "cuda" and call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            found.append(f"its kernel takes float16, bfloat16 and float32, not {call.dtype}")
        if kind == "cuda" and call.head_dim < 16:
            found.append(f"its kernel needs a head dimension of at least 16, not {call.head_dim}")
        if kind == "cuda" and call.capability is not None and call.capability < (7, 5):
            found.append(f"its kernel needs compute capability 7.5, the device has {_dotted(call.capability)}")
        if call.dropout:
            found.append("it drops no attention weights")
        return tuple(found)

    def reason_for(self, call: Call) -> str | None:
        if call.device.type != "cuda" or call.pattern.count * call.pattern.keys < _WORTH_A_BLOCK_MASK:
            return None
        return "skips blocks that are masked out, and keeps no matrix"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float = 0.0) -> Tensor:
        mask = pattern.once("flex", lambda: _block_mask(pattern))
        kernel = _compiled() if q.device.type == "cuda" and not torch.compiler.is_compiling() else flex_attention
        mixed = kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        assert isinstance(mixed, Tensor)
        return mixed


def _block_mask(pattern: Pattern) -> BlockMask:
    positions = pattern.positions

    def seen(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = sequence if len(positions) > 1 else torch.zeros_like(sequence)
        return pattern.sees(sequence, positions[row, query], key)

    varies = pattern.mask.per_sequence or len(positions) > 1
    return create_block_mask(
        seen,
        pattern.batch if varies else None,
        None,
        pattern.count,
        pattern.keys,
        device=str(pattern.device),
    )


@cache
def _compiled() -> Callable[..., object]:
    return torch.compile(flex_attention)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
