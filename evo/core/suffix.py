"""A model that has read what stands on both sides of a gap, and can go on in it.

B batch, P prefix tokens, S suffix tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo.core.order import gathered, is_repeated
from evo.core.prompted import Prompted

if TYPE_CHECKING:
    from evo.core.model import Evo


@dataclass(frozen=True, kw_only=True)
class Suffix:
    """Clean context on the right of what is to be written.

    Attributes:
        tokens: ids (B, S), right-padded.
        lengths: (B,) tokens present in each; None is all of S.
        gap: (B,) tokens that have room between prefix and suffix: the suffix stands behind them, whether or not they are all written.
    """

    tokens: Tensor
    lengths: Tensor | None
    gap: Tensor


def between(model: Evo, prefix: Tensor, lengths: Tensor | None, suffix: Suffix | None, room: int) -> Prompted:
    """The state in which the first token behind a prefix is spoken of, in view of a suffix if there is one: read as `Order` says.

    Keys and values of the prefix do not depend on the suffix, and those of both not on what will stand between them.

    Args:
        model: the model.
        prefix: ids (B, P).
        lengths: (B,) tokens present in each prefix; None is all of P.
        suffix: what stands on the right; None is nothing.
        room: tokens that may follow.
    """
    if suffix is None or not suffix.tokens.shape[1]:
        return Prompted(model, prefix, lengths, room)
    size = suffix.tokens.shape[1]
    state = Prompted(model, prefix, lengths, room + size + 1)
    hidden, embeddings = state.hidden, state.denoiser.embeddings
    count = torch.full((len(prefix),), size, device=prefix.device) if suffix.lengths is None else suffix.lengths
    before = torch.full_like(count, prefix.shape[1]) if lengths is None else lengths
    state.cache.shift = suffix.gap
    latents = embeddings[suffix.tokens]
    state.read(latents, torch.zeros_like(latents[..., 0]))
    if suffix.lengths is not None:
        state.forget(size - count)
    before = before + model.bos_slots
    again = is_repeated(before, count)
    state.cache.shift = -(count + again)
    latents = embeddings[prefix]
    latents, level = model.behind_bos(latents, torch.zeros_like(latents[..., 0]))
    if latents.shape[1]:
        last = (before - 1).clamp(min=0)[:, None]
        state.read(gathered(latents, last), gathered(level, last))
        state.forget(1 - again)
    else:
        state.hidden = hidden
    state.hidden = torch.where(again.bool()[:, None, None], state.hidden, hidden)
    return state
