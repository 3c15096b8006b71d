"""`xformers.ops.memory_efficient_attention`: kernels with linear memory for packed and ragged sequences too, on CUDA.

The only file that imports xformers, and only when a call needs it.

B batch, Q queries, K keys, H query heads, G key/value heads, C head dimension.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from evo.core.backends.base import Backend, Call
from evo.core.masks import AllOf, Causal, Document, Piece
from evo.core.pattern import Pattern


class Lowered(NamedTuple):
    """One call of the kernel.

    Attributes:
        queries: start and stop of its queries.
        keys: how many leading keys they may see.
        bias: None, one of the kernel's bias objects, or a dense one, (1 or B, 1, Q, K), which is added to the logits.
        packed: how many keys apart the sequences of the batch are laid one behind another, as block-diagonal biases want it; 0 for
            a batch as it is.
    """

    queries: tuple[int, int]
    keys: int
    bias: Any
    packed: int = 0


@dataclass(frozen=True)
class Xformers(Backend):
    """The kernels of xformers, with a bias object where one fits the mask, and a dense bias elsewhere.

    Args:
        kernel: in place of `memory_efficient_attention`, on any device; None is that.
    """

    kernel: Callable[..., Tensor] | None = None

    name: ClassVar[str] = "xformers"

    def reasons_against(self, call: Call) -> tuple[str, ...]:
        if torch.compiler.is_compiling():
            return ("torch.compile cannot trace it",)
        found = []
        if call.head_dim % 8:
            found.append(f"its kernels need a head dimension that is a multiple of 8, not {call.head_dim}")
        if self.kernel is not None:
            return tuple(found)
        if call.device.type != "cuda":
            found.append(f"its kernels run on cuda, not on {call.device.type}")
        if not _installed():
            found.append("it is missing: pip install 'evo-lm[xformers]'")
        if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            found.append(f"its kernels take float16, bfloat16 and float32, not {call.dtype}")
        if call.capability is not None and call.capability > (9, 0):
            # Beyond 9.0 there are only its flash kernels.
            if not _flash(call):
                found.append(
                    f"beyond compute capability 9.0 it takes half precision and head dimensions to 256, not {call.dtype}"
                )
            elif _form(call) == _DENSE:
                found.append("beyond compute capability 9.0 it takes no dense mask, and no other form fits this one")
        return tuple(found)

    def reason_for(self, call: Call) -> str | None:
        form = _form(call)
        return None if form == _DENSE else f"needs no matrix for this mask: {form}"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float = 0.0) -> Tensor:
        call = Call.of(q, k, v, pattern, dropout)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        slots = _slots(k)
        plan = pattern.once(("xformers", call.dtype, call.gradient, slots), lambda: _lower(call, slots))
        kernel = self.kernel or _ops().memory_efficient_attention
        parts = []
        for step in plan:
            some_q, some_k, some_v = q[:, slice(*step.queries)], k[:, : step.keys], v[:, : step.keys]
            if step.packed:
                some_q, some_k, some_v = (
                    some_q.reshape(1, -1, *q.shape[2:]),
                    _packed(some_k, step.packed),
                    _packed(some_v, step.packed),
                )
            mixed = _grouped(kernel, some_q, some_k, some_v, step.bias, dropout, copy=call.gradient)
            parts.append(mixed.reshape(len(q), -1, *mixed.shape[2:]))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(1, 2)


# The forms a mask can take, best first.
_PIECES = "rectangles and triangles"
_DOCUMENTS = "packed documents"
_RAGGED = "keys of different lengths"
_DENSE = "a dense matrix"


def _form(call: Call) -> str:
    pattern = call.pattern
    if pattern.pieces is not None:
        return _PIECES
    if _documents(pattern) is not None:
        return _DOCUMENTS
    # Of the biases with padded keys there is no backward, and without the flash kernels only the causal one.
    causal = _ragged(pattern)
    if causal is not None and not call.gradient and (causal or _flash(call)):
        return _RAGGED
    return _DENSE


def _lower(call: Call, slots: int) -> tuple[Lowered, ...]:
    """The calls of the kernel for (B, K) keys in a storage of `slots` slots a sequence."""
    pattern, form = call.pattern, _form(call)
    if form == _PIECES:
        assert pattern.pieces is not None
        return tuple(Lowered((piece.start, piece.stop), piece.keys, _triangle(piece)) for piece in pattern.pieces)
    whole = (0, pattern.count)
    if form == _DOCUMENTS:
        documents = _documents(pattern)
        assert documents is not None
        lengths, causal = documents
        bias = _biases().BlockDiagonalMask.from_seqlens(lengths, device=pattern.device)
        return (Lowered(whole, pattern.keys, bias.make_causal() if causal else bias, pattern.keys),)
    if form == _RAGGED:
        kinds = _biases()
        kind = (
            kinds.BlockDiagonalCausalWithOffsetPaddedKeysMask if _ragged(pattern) else kinds.BlockDiagonalPaddedKeysMask
        )
        bias = kind.from_seqlens(
            q_seqlen=[pattern.count] * pattern.batch,
            kv_padding=slots,
            kv_seqlen=list(pattern.ends or ()),
            device=pattern.device,
        )
        return (Lowered(whole, pattern.keys, bias, slots),)
    return (Lowered(whole, pattern.keys, _dense(pattern, call.dtype)),)


def _triangle(piece: Piece) -> Any:
    if not piece.causal:
        return None
    kinds = _biases()
    square = piece.stop - piece.start == piece.keys
    return kinds.LowerTriangularMask() if square else kinds.LowerTriangularFromBottomRightMask()


def _documents(pattern: Pattern) -> tuple[list[int], bool] | None:
    """Lengths of all documents of the batch, and whether they are causal, if the pattern is that and nothing else."""
    masks = pattern.mask.masks if isinstance(pattern.mask, AllOf) else (pattern.mask,)
    documents = [mask for mask in masks if isinstance(mask, Document)]
    causal = [mask for mask in masks if isinstance(mask, Causal)]
    if len(documents) != 1 or len(masks) != 1 + len(causal) or documents[0].lengths is None:
        return None
    lengths = documents[0].lengths * (pattern.batch if len(documents[0].lengths) == 1 else 1)
    whole = (
        isinstance(pattern.queries, int) and pattern.queries == 0 and pattern.count == pattern.keys == sum(lengths[0])
    )
    return (list(chain.from_iterable(lengths)), bool(causal)) if whole else None


def _ragged(pattern: Pattern) -> bool | None:
    """Whether the pattern is causal, if each sequence's queries are its last positions and see all it has or a triangle of it."""
    if pattern.ends is None:
        return None
    found = {pattern.mask.pieces(end - pattern.count, pattern.count, end) for end in set(pattern.ends)}
    shapes = set()
    for pieces in found:
        if pieces is None or len(pieces) != 1:
            return None
        shapes.add((pieces[0].causal, pieces[0].stop - pieces[0].start))
    return shapes.pop()[0] if len(shapes) == 1 else None


def _dense(pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """The mask as a bias (1 or B, 1, Q, K) whose rows are a multiple of 8 apart, which the kernel asks for."""
    matrix = pattern.matrix
    room = torch.full((*matrix.shape[:-1], -(-pattern.keys // 8) * 8), float("-inf"), dtype=dtype, device=matrix.device)
    return room[..., : pattern.keys].masked_fill_(matrix, 0.0)


def _grouped(
    kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, bias: Any, dropout: float, copy: bool
) -> Tensor:
    """Attention of (B, Q, H, C) to (B, K, G, C): groups share keys and values by a stride of zero, or, for a backward, by copies."""
    batch, count, heads, dim = q.shape
    groups = k.shape[2]
    if groups != heads:
        if copy:
            k, v = (x.repeat_interleave(heads // groups, 2) for x in (k, v))
        else:
            q = q.reshape(batch, count, groups, heads // groups, dim)
            k, v = (x.unsqueeze(3).expand(-1, -1, -1, heads // groups, -1) for x in (k, v))
    if isinstance(bias, Tensor):
        shape = (batch, *q.shape[2:-1], count, k.shape[1])
        bias = (bias.unsqueeze(1) if q.dim() == 5 else bias).expand(shape)
    return kernel(q, k, v, attn_bias=bias, p=dropout).reshape(batch, count, heads, dim)


def _slots(x: Tensor) -> int:
    """How many tokens apart the sequences of (B, K, G, C) lie in memory, K if it is not laid out as (B, ·, G, C)."""
    token = x.shape[2] * x.shape[3]
    as_stored = (
        x.stride()[1:] == (token, x.shape[3], 1) and x.stride(0) % token == 0 and x.stride(0) >= x.shape[1] * token
    )
    return x.stride(0) // token if as_stored and len(x) > 1 else x.shape[1]


def _packed(x: Tensor, slots: int) -> Tensor:
    """(B, K, G, C) as (1, B·slots, G, C), what lies between sequences included: a view where `slots` is `_slots(x)`."""
    if slots == x.shape[1]:
        return x.reshape(1, -1, *x.shape[2:])
    return x.as_strided((1, len(x) * slots, *x.shape[2:]), (x.stride(0), *x.stride()[1:]))


def _flash(call: Call) -> bool:
    """Whether the flash kernels can serve: Ampere and newer, half precision."""
    if call.capability is None:
        return True
    return call.capability >= (8, 0) and call.dtype in (torch.float16, torch.bfloat16) and call.head_dim <= 256


@cache
def _installed() -> bool:
    return importlib.util.find_spec("xformers") is not None


@cache
def _ops() -> ModuleType:
    # At import it warns of what its build lacks and of deprecations of its own, none of which a caller can do anything about.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import xformers.ops

        return xformers.ops


@cache
def _biases() -> ModuleType:
    _ops()
    from xformers.ops.fmha import attn_bias

    return attn_bias
