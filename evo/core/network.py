"""The network of Evo: a latent space, a backbone, a schedule and heads, and the two halves that they make.

B batch, N tokens, V vocabulary, D latent dimension, W width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evo.core.answers import described
from evo.core.bos import bos_slots
from evo.core.config import EvoConfig
from evo.core.documents import Documents
from evo.core.latent_space import Embeddings
from evo.core.masks import Causal, Window
from evo.core.order import Order, gathered
from evo.core.transformer import Transformer
from evo.heads import Readout, TimestepHead
from evo.schedules import Cosine, Schedule


class Network(nn.Module):
    """The parts of an `Evo`, and its two halves as passes of one backbone: latents and levels in, hidden states out.

    The same weights serve both: under a causal mask they sketch (output j speaks of token j+1), under a window mask they refine (every
    position of the window speaks of its own token).

    Args:
        latent_space: embeddings e(v), (V, D).
        backbone: latents (B, N, D) and levels (B, N) to hidden states (B, N, W), called like `Transformer`.
        schedule: the noise schedule; None is `Cosine()`.
        timestep_head: level of a token from the hidden state and context logits that speak of it; None is `TimestepHead(W)`.
        readout: context logits from hidden states (B, N, W) and embeddings (V, D); None is `Readout`, which shares the embeddings.
        bos: "attended" is a learned latent (D,) before the first token, which speaks of it and which every token sees; "detached", for
            networks pretrained without one, is a learned hidden state (W,) that speaks of the first token (evenly of all entries, at
            first) and that no token sees.
        config: what `save_pretrained` writes; None for a model composed by hand, which is loaded into a model composed alike.

    Raises:
        TypeError: for a part of another kind, such as a class or a name, or a backbone that lacks what it needs.
        ValueError: for a latent space and a backbone that do not fit.
    """

    def __init__(
        self,
        *,
        latent_space: Embeddings,
        backbone: Transformer,
        schedule: Schedule | None = None,
        timestep_head: nn.Module | None = None,
        readout: nn.Module | None = None,
        bos: str = "attended",
        config: EvoConfig | None = None,
    ) -> None:
        super().__init__()
        _check_parts(latent_space, backbone, schedule, timestep_head, readout)
        if latent_space.dim != backbone.dim:
            raise ValueError(
                f"the latent space has dimension {latent_space.dim}, the backbone takes {backbone.dim}; they must agree"
            )
        self.latent_space = latent_space
        self.backbone = backbone
        self.schedule = Cosine() if schedule is None else schedule
        self.timestep_head = TimestepHead(backbone.width) if timestep_head is None else timestep_head
        self.readout = (
            Readout(backbone.width, latent_space.dim, latent_space.vocab_size) if readout is None else readout
        )
        self.bos_slots = bos_slots(bos)
        if self.bos_slots:
            self.bos = nn.Parameter(torch.randn(latent_space.dim) * latent_space.radius * latent_space.dim**-0.5)
        else:
            self.bos = nn.Parameter(torch.zeros(backbone.width))
        self.config = config

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.backbone.positions - self.bos_slots

    def sketch(
        self,
        latents: Tensor,
        level: Tensor,
        *,
        order: Order | None = None,
        known: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The causal half: latents (B, N, D) at levels (B, N) -> hidden states (B, N, W); row i speaks of token i, from z_<i alone.

        With an `order` it speaks of token i from what is read before it: in a window, from the suffix too.

        With `known` (B,) int64 it is a parallel sketch: of each sequence so many leading tokens are known, and the others are waiting:
        noise, at level 1, as `latents` and `level` must say. Row `known` speaks from z_<known as ever, and each row i behind it from
        the token's own noise and all that precedes it.

        With `documents` it speaks of token i from what precedes it in its own document. With an `order` they must have
        been made for each other (`Documents.read_in`).
        """
        if known is not None:
            return self._sketch_in_parallel(latents, level, known, order, documents)
        if order is not None:
            latents, level = self.behind_bos(latents, level)
            # The row of the last slot would speak of nothing.
            rows = positions = order.rows[:, :-1]
            mask = Causal()
            if documents is not None:
                mask, positions = documents.mask(mask), documents.positions[:, :-1]
            hidden = self.hidden_states(gathered(latents, rows), gathered(level, rows), mask=mask, positions=positions)
            if self.bos_slots:
                return gathered(hidden, order.speakers)
            return gathered(torch.cat([self.first_hidden(len(latents)), hidden], 1), order.speakers + 1)
        latents, level = self.behind_bos(latents[:, :-1], level[:, :-1])
        mask, positions = Causal(), None
        if documents is not None:
            mask, positions = documents.mask(mask), documents.positions[:, :-1]
        if self.bos_slots:
            hidden = self.hidden_states(latents, level, mask=mask, positions=positions)
        else:
            hidden = self.first_hidden(len(latents))
            if level.shape[1]:
                hidden = torch.cat([hidden, self.hidden_states(latents, level, mask=mask, positions=positions)], 1)
        return hidden if documents is None else documents.spoken(hidden)

    def _sketch_in_parallel(
        self, latents: Tensor, level: Tensor, known: Tensor, order: Order | None, documents: Documents | None
    ) -> Tensor:
        before, known = self.bos_slots, known[:, None]
        latents, level = self.behind_bos(latents, level)
        slot, token = (torch.arange(latents.shape[1] + extra, device=latents.device) for extra in (0, -before))
        mask, positions, speakers, own = Causal(), None, token + before - 1, slot >= known + before
        late = token > known
        if order is not None:
            latents, level = gathered(latents, order.rows), gathered(level, order.rows)
            slot = torch.arange(latents.shape[1], device=latents.device)
            # In the window alone places are waiting; the suffix, read before it, stands behind it.
            own = (order.rows >= known + before) & (slot >= order.window[:, None])
            positions, speakers = order.rows, order.speakers
        if documents is not None:
            mask, positions = documents.mask(mask), documents.positions
            # BOS speaks of a document's first token, whether that is waiting or not.
            late = late & ~documents.begin
        hidden = self.hidden_states(latents, level, mask=mask, own=own, positions=positions)
        speakers = speakers + late
        if not before:
            hidden, speakers = torch.cat([self.first_hidden(len(latents)), hidden], 1), speakers + 1
        hidden = gathered(hidden, speakers)
        return hidden if documents is None or order is not None else documents.spoken(hidden)

    @property
    def self_conditioned(self) -> bool:
        """Whether refinement takes its own earlier estimate of the clean latents."""
        return self.backbone.self_conditioned

    def refine(
        self,
        latents: Tensor,
        level: Tensor,
        *,
        prompt: Tensor | None = None,
        end: Tensor | None = None,
        estimate: Tensor | None = None,
        order: Order | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The refining half: latents (B, N, D) at levels (B, N) -> hidden states (B, N, W); row i speaks of token i itself.

        Args:
            latents, level: prompt and window together.
            prompt: (B,) leading tokens that are prompt, None for none; their rows speak of the next token and see no window.
            end: (B,) tokens present, None for all.
            estimate: (B, N, D) an earlier estimate of the clean latents, for a network built with `self_conditioning`.
            order: in which tokens are read where a suffix, whose rows speak of the next token too, follows the window; it knows where
                prompt and tokens end.
            documents: that share a sequence; each sees its own part of the prompt, and its own part of the window. With an order they must
                have been made for each other (`Documents.read_in`).
        """
        before = self.bos_slots
        if order is not None:
            latents, level = self.behind_bos(latents, level)
            if estimate is not None:
                estimate = gathered(F.pad(estimate, (0, 0, before, 0)), order.rows)
            mask, positions = Window(order.window, order.end), order.rows
            if documents is not None:
                mask, positions = documents.mask(mask), documents.positions
            hidden = self.hidden_states(
                gathered(latents, order.rows),
                gathered(level, order.rows),
                mask=mask,
                own=torch.arange(order.rows.shape[1], device=latents.device) >= order.window[:, None],
                estimate=estimate,
                positions=positions,
            )
            return gathered(hidden, order.slots)
        index = torch.arange(latents.shape[1] + before, device=latents.device)
        begin = before if prompt is None else prompt + before
        own = index >= (begin if prompt is None else prompt[:, None] + before)
        mask, positions = Window(begin, None if end is None else end + before), None
        if documents is not None:
            mask, positions = documents.mask(mask), documents.positions
        if estimate is not None:
            estimate = F.pad(estimate, (0, 0, before, 0))
        latents, level = self.behind_bos(latents, level)
        hidden = self.hidden_states(latents, level, mask=mask, own=own, estimate=estimate, positions=positions)
        return hidden[:, before:]

    def hidden_states(self, latents: Tensor, level: Tensor, **options: Any) -> Tensor:
        """Latents (B, N, D), as noisy as their levels (B, N) say, -> hidden states (B, N, W); the options are those of the backbone.

        The backbone reads of each latent what is to be expected of it (`Embeddings.expected`). Noise is far longer than an embedding, and
        a network that reads it has to learn to overlook it.
        """
        return self.backbone(self.latent_space.expected(latents, level, self.schedule), level, **options)

    def behind_bos(self, latents: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, N, D) and levels (B, N) as the backbone reads them: with those of BOS before them, if it is attended."""
        if not self.bos_slots:
            return latents, level
        bos = self.bos.to(latents.dtype).expand(len(latents), 1, -1)
        return torch.cat([bos, latents], dim=1), F.pad(level, (1, 0))

    def first_hidden(self, batch: int) -> Tensor:
        """The hidden state (B, 1, W) of a detached BOS, which speaks of the first token."""
        return self.bos.expand(batch, 1, -1)


def _check_parts(
    latent_space: Embeddings, backbone: nn.Module, schedule: object, head: object, readout: object
) -> None:
    if not isinstance(latent_space, Embeddings):
        raise TypeError(
            f"latent_space is {described(latent_space)}; it needs an `Embeddings`, such as LatentSpace(V, D)"
        )
    if not isinstance(backbone, nn.Module):
        raise TypeError(
            f"backbone is {described(backbone)}; it needs a module, such as Transformer(D, W, depth, heads, positions=...)"
        )
    needed = {"dim": int, "width": int, "positions": int, "self_conditioned": bool}
    if missing := [
        f"{name} ({kind.__name__})"
        for name, kind in needed.items()
        if not isinstance(getattr(backbone, name, None), kind)
    ]:
        raise TypeError(
            f"backbone {type(backbone).__name__} lacks {', '.join(missing)}; a backbone needs D, W, the positions it has "
            "(an attended BOS takes one) and whether it takes an estimate as attributes, see docs/extending.md"
        )
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule is {described(schedule)}; it needs a `Schedule`, such as Cosine(), or None for that")
    for name, part in (("timestep_head", head), ("readout", readout)):
        if part is not None and (isinstance(part, type) or not callable(part)):
            raise TypeError(f"{name} is {described(part)}; it needs a module, or None for the default")
