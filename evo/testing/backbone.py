"""What a backbone owes the model: who sees whom, where tokens stand, and that neither caches nor packed rows change what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from evo.core.agenda import Agenda
from evo.core.cache import Cache
from evo.core.masks import Causal, Document, Leading, Window
from evo.testing.errors import require, require_all, require_close

# Differences between two ways to compute the same in float64, and what is no difference.
_SAME, _SEEN = 1e-9, 1e-7
_LENGTH, _PROMPT = 6, 3


def check_backbone(backbone: nn.Module, *, batch: int = 3) -> None:
    """Hold a backbone to what the model relies on; works on a float64 copy on the CPU, in evaluation mode.

    It has the attributes of a backbone, and gives finite hidden states (B, N, W). Under a causal mask a row sees nothing behind it,
    latents or levels; under a window mask a window sees all of itself and nothing behind its end, and the prompt none of it. A sequence
    alone is that sequence in a batch of `batch`, a document alone that document behind another at `positions` of its own. A cache
    changes nothing, nor do sequences of different lengths in it, nor a gradient, nor `packing`. `own` and, in a self-conditioned
    backbone, `estimate` are taken in.

    Weights of the copy are moved at random, because one that starts at zero would hide what is wrong behind it.

    Raises PropertyError, naming the property and the error; ValueError for fewer than 2 sequences, or too few positions to check.
    """
    _check_attributes(backbone)
    dim: Any = backbone.dim
    positions: Any = backbone.positions
    if batch < 2 or positions < _LENGTH:
        raise ValueError(
            f"needs a batch of 2 sequences and {_LENGTH} positions or more, got batch {batch} and {positions} positions"
        )
    backbone = copy.deepcopy(backbone).to("cpu", torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        latents = torch.randn(batch, _LENGTH, dim, dtype=torch.float64, generator=generator)
        level = torch.rand(batch, _LENGTH, dtype=torch.float64, generator=generator) * 0.9 + 0.1
        _check_rows(backbone, latents, level)
        _check_masks(backbone, latents, level)
        _check_inputs(backbone, latents, level)
        _check_documents(backbone, latents, level)
        _check_cache(backbone, latents, level)
        _check_unequal_lengths(backbone, latents, level)
        _check_packing(backbone, latents, level)
    _check_gradient(backbone, latents, level)


def _check_attributes(backbone: Any) -> None:
    for name, kind in (("dim", int), ("width", int), ("positions", int), ("self_conditioned", bool)):
        value = getattr(backbone, name, None)
        require(
            f"a backbone has `{name}`, {kind.__name__}",
            isinstance(value, kind),
            f"{type(backbone).__name__} has {value!r}",
        )


def _check_rows(backbone: nn.Module, latents: Tensor, level: Tensor) -> None:
    hidden = backbone(latents, level)
    shape = (*level.shape, backbone.width)
    require("hidden states are (B, N, W)", hidden.shape == shape, f"needed {shape}, got {tuple(hidden.shape)}")
    require_all("hidden states are finite", hidden.isfinite(), hidden=hidden)
    alone = torch.cat([backbone(latents[row : row + 1], level[row : row + 1]) for row in range(len(latents))])
    require_close("a sequence alone is that sequence in a batch", hidden, alone, _SAME)


def _check_masks(backbone: nn.Module, latents: Tensor, level: Tensor) -> None:
    batch, length = level.shape
    causal = backbone(latents, level, mask=Causal())
    require_close("without a mask a backbone is causal", backbone(latents, level), causal, _SAME)
    for i in range(1, length):
        other = _changed(latents, level, slice(i, None))
        claim = f"under a causal mask the rows before {i} see neither latents nor levels from there on"
        require_close(claim, backbone(*other, mask=Causal())[:, :i], causal[:, :i], _SAME)

    own = torch.arange(length) >= _PROMPT
    window = backbone(latents, level, mask=Window(_PROMPT), own=own)
    other = backbone(*_changed(latents, level, slice(_PROMPT, None)), mask=Window(_PROMPT), own=own)
    require_close("a prompt does not see its window", other[:, :_PROMPT], window[:, :_PROMPT], _SAME)
    other = backbone(*_changed(latents, level, slice(_PROMPT + 1, None)), mask=Window(_PROMPT), own=own)
    _require_change("a window sees what stands behind in it", other[:, _PROMPT], window[:, _PROMPT])
    end = torch.tensor([length - row % 2 for row in range(batch)])
    absent = torch.arange(length) >= end[:, None]
    held = backbone(latents, level, mask=Window(_PROMPT, end), own=own)
    other = backbone(*_changed(latents, level, absent), mask=Window(_PROMPT, end), own=own)
    require_close("nobody sees what is behind the end of a window", other[~absent], held[~absent], _SAME)


def _check_inputs(backbone: nn.Module, latents: Tensor, level: Tensor) -> None:
    batch, length = level.shape
    nowhere, everywhere = torch.zeros(length, dtype=torch.bool), torch.ones(length, dtype=torch.bool)
    plain, owned = backbone(latents, level), backbone(latents, level, own=everywhere)
    _require_change("a row that speaks of its own token differs from one that speaks of the next (`own`)", owned, plain)
    require_close("`own` is False where it is None", backbone(latents, level, own=nowhere), plain, _SAME)
    spread = backbone(latents, level, own=everywhere.expand(batch, -1))
    require_close("`own` (N,) is (B, N) with equal rows", spread, owned, _SAME)
    places = torch.arange(length).expand(batch, -1)
    require_close("`positions` None is 0, 1, ...", backbone(latents, level, positions=places), plain, _SAME)
    if not backbone.self_conditioned:
        return
    estimate = latents.flip(0)
    require_close(
        "`estimate` None is zeros", backbone(latents, level, estimate=torch.zeros_like(latents)), plain, _SAME
    )
    _require_change(
        "a self-conditioned backbone takes `estimate` in", backbone(latents, level, estimate=estimate), plain
    )
    clean = torch.zeros_like(level)
    claim = "nothing is taken of an estimate where the level is 0"
    require_close(claim, backbone(latents, clean, estimate=estimate), backbone(latents, clean), _SAME)


def _check_documents(backbone: nn.Module, latents: Tensor, level: Tensor) -> None:
    """Two documents behind a position that both see, as BOS is, at positions that count from there."""
    (batch, length), cut = level.shape, _PROMPT
    places = torch.cat([torch.arange(cut), torch.arange(1, length - cut + 1)]).expand(batch, -1)
    apart = Document.from_lengths([[cut, length - cut]] * batch)
    rows = [0, *range(cut, length)]
    for mask in (Causal(), Window(1)):
        found = backbone(latents, level, mask=(apart & mask) | Leading(1), positions=places)
        first = backbone(latents[:, :cut], level[:, :cut], mask=mask)
        second = backbone(latents[:, rows], level[:, rows], mask=mask)[:, 1:]
        claim = f"a document behind another, at `positions` of its own, says what it says alone ({type(mask).__name__})"
        require_close(claim, found, torch.cat([first, second], 1), _SAME)


def _check_cache(backbone: nn.Module, latents: Tensor, level: Tensor) -> None:
    whole, cache = backbone(latents, level), Cache(1)
    first = _stored(backbone, latents[:, :_PROMPT], level[:, :_PROMPT], cache)
    require_close("a cache changes nothing of what is stored in it", first, whole[:, :_PROMPT], _SAME)
    own = torch.arange(level.shape[1]) >= _PROMPT
    dense = backbone(latents, level, mask=Window(_PROMPT), own=own)[:, _PROMPT:]
    for _ in range(2):
        found = backbone(latents[:, _PROMPT:], level[:, _PROMPT:], mask=Window(0), own=own[_PROMPT:], cache=cache)
        require_close(
            "a window behind a cache says what it says behind its prompt, again and again", found, dense, _SAME
        )
    require("without `store` nothing is stored", cache.length == _PROMPT, f"the cache has {cache.length} tokens")
    rest = _stored(backbone, latents[:, _PROMPT:], level[:, _PROMPT:], cache)
    require_close("tokens behind a cache say what they say behind the tokens in it", rest, whole[:, _PROMPT:], _SAME)


def _check_unequal_lengths(backbone: nn.Module, latents: Tensor, level: Tensor) -> None:
    """Of each sequence some tokens are taken back, so that the rest of them stand behind different lengths."""
    back = torch.arange(len(latents)) % _PROMPT
    cache = Cache(_LENGTH)
    _stored(backbone, latents[:, :_PROMPT], level[:, :_PROMPT], cache)
    cache.rewind(back)
    found = _stored(backbone, latents[:, _PROMPT:], level[:, _PROMPT:], cache)
    for row, less in enumerate(back.tolist()):
        kept = [*range(_PROMPT - less), *range(_PROMPT, _LENGTH)]
        alone = backbone(latents[row : row + 1, kept], level[row : row + 1, kept])[:, _PROMPT - less :]
        claim = "behind a cache whose sequences differ in length each says what it says alone"
        require_close(claim, found[row : row + 1], alone, _SAME)


def _check_packing(backbone: nn.Module, latents: Tensor, level: Tensor) -> None:
    """Windows packed into one row, first of one length, then of several: of each all tokens, then those at its ends."""
    batch, size = len(latents), _LENGTH - _PROMPT
    own = torch.ones(size, dtype=torch.bool)
    window, noise = latents[:, _PROMPT:], level[:, _PROMPT:]
    # In its second row the tokens in the middle stand still.
    plan = torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64)[None, :, None].repeat(batch, 1, size)
    plan[:, 2, 1:-1] = 0.7
    for less in (0, 1):
        cache, lengths = Cache(_LENGTH), [size - less * (row % 2) for row in range(batch)]
        _stored(backbone, latents[:, :_PROMPT], level[:, :_PROMPT], cache)
        mask, apart = Window(0, _PROMPT + torch.tensor(lengths)), cache.take(torch.arange(batch))
        dense = backbone(window, noise, mask=mask, own=own, cache=apart).flatten(0, 1)
        present = torch.arange(size) < torch.tensor(lengths)[:, None]
        agenda = Agenda(plan * present[:, None], [_PROMPT] * batch, lengths, refresh=3, waiting=False)
        for row in (0, 1):
            work = agenda.begin(row)
            assert work is not None
            found = backbone(
                window.flatten(0, 1)[work.computed][None],
                noise.flatten()[work.computed][None],
                own=own[:1],
                cache=cache,
                packing=work.packing,
            )
            shape = (1, len(work.computed), backbone.width)
            claim = "packed tokens (1, T) have hidden states (1, T, W)"
            require(claim, found.shape == shape, f"needed {shape}, got {tuple(found.shape)}")
            require_close(
                "packed tokens (`packing`) say what windows say that are not packed",
                found[0],
                dense[work.computed],
                _SAME,
            )
        require("a packed pass stores nothing", cache.length == _PROMPT, f"the cache has {cache.length} tokens")


def _check_gradient(backbone: nn.Module, latents: Tensor, level: Tensor) -> None:
    own = torch.arange(level.shape[1]) >= _PROMPT
    cache = Cache(_LENGTH)
    with torch.no_grad():
        _stored(backbone, latents[:, :_PROMPT], level[:, :_PROMPT], cache)

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        window = latents[:, _PROMPT:].clone().requires_grad_()
        found = run(window)
        return torch.autograd.grad(found.square().sum(), window)[0]

    def dense(window: Tensor) -> Tensor:
        return backbone(torch.cat([latents[:, :_PROMPT], window], 1), level, mask=Window(_PROMPT), own=own)[:, _PROMPT:]

    def behind(window: Tensor) -> Tensor:
        return backbone(window, level[:, _PROMPT:], mask=Window(0), own=own[_PROMPT:], cache=cache)

    claim = "behind a cache the gradient of a window is that of the window behind its prompt"
    require_close(claim, gradient(behind), gradient(dense), _SAME)


def _stored(backbone: nn.Module, latents: Tensor, level: Tensor, cache: Cache) -> Tensor:
    """Hidden states of tokens that the backbone is asked to store."""
    before, count = cache.length, latents.shape[1]
    hidden = backbone(latents, level, cache=cache, store=True)
    found = f"asked to store {count} tokens, it stored {cache.length - before}: see `cache.write` and `cache.advance`"
    require("with `store` a backbone stores its tokens in the cache", cache.length == before + count, found)
    return hidden


def _changed(latents: Tensor, level: Tensor, where: slice | Tensor) -> tuple[Tensor, Tensor]:
    """Latents (B, N, D) and levels (B, N) with others in some columns, or where a mask (B, N) is True."""
    marked = torch.zeros_like(level, dtype=torch.bool)
    if isinstance(where, slice):
        marked[:, where] = True
    else:
        marked = where
    return torch.where(marked[..., None], -1.5 * latents, latents), torch.where(marked, 1.1 - level, level)


def _require_change(claim: str, got: Tensor, before: Tensor) -> None:
    moved = (got - before).abs().max().item()
    require(claim, moved > _SEEN, f"what it says moves by {moved:.1e}")
