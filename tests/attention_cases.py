"""Masks with a definition of their own, written without tensors, and attention written out, for the tests of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from evo.core import BlockCausal, Causal, Document, Mask, Pattern, Window

CPU = torch.device("cpu")
LENGTH = 12
Sees = Callable[[int, int, int], bool]


@dataclass(frozen=True)
class Case:
    """A mask and, for sequence, query and key, whether it should let the one see the other."""

    mask: Mask
    sees: Sees

    def matrix(self, positions: list[list[int]], keys: int, ends: tuple[int, ...] | None = None) -> torch.Tensor:
        """What a pattern of the mask should be: bool (B, 1, Q, K)."""
        rows = [
            [
                [k == q or (self.sees(b, q, k) and (ends is None or k < ends[b])) for k in range(keys)]
                for q in positions[b]
            ]
            for b in range(len(positions))
        ]
        return torch.tensor(rows).unsqueeze(1)


def _numbers(batch: int, low: int, high: int) -> st.SearchStrategy[int | list[int]]:
    one = st.integers(low, high)
    return one | st.lists(one, min_size=batch, max_size=batch)


def _given(value: int | list[int] | None) -> int | torch.Tensor | None:
    return torch.tensor(value) if isinstance(value, list) else value


def _at(value: int | list[int], b: int) -> int:
    return value[b] if isinstance(value, list) else value


@st.composite
def windows(draw: st.DrawFn, batch: int) -> Case:
    prompt, length = draw(_numbers(batch, 0, LENGTH)), draw(st.none() | _numbers(batch, 1, LENGTH + 2))

    def sees(b: int, q: int, k: int) -> bool:
        inside = q >= _at(prompt, b) and k >= _at(prompt, b)
        return (k <= q or inside) and (length is None or k < _at(length, b))

    return Case(Window(_given(prompt), _given(length)), sees)


@st.composite
def blocks(draw: st.DrawFn, batch: int) -> Case:
    size, prompt = draw(st.integers(1, LENGTH)), draw(_numbers(batch, 0, LENGTH))

    def sees(b: int, q: int, k: int) -> bool:
        first = _at(prompt, b)
        if q < first or k < first:
            return k <= q
        return (k - first) // size <= (q - first) // size

    return Case(BlockCausal(size, _given(prompt)), sees)


@st.composite
def document_lengths(draw: st.DrawFn, batch: int, total: int = LENGTH) -> list[list[int]]:
    found = []
    for _ in range(batch):
        cuts = sorted(draw(st.sets(st.integers(1, total - 1), max_size=3))) if total > 1 else []
        found.append([stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)])
    return found


@st.composite
def documents(draw: st.DrawFn, batch: int) -> Case:
    lengths = draw(document_lengths(draw(st.sampled_from([1, batch]))))
    ids = [[index for index, length in enumerate(each) for _ in range(length)] for each in lengths]
    known = draw(st.booleans())
    mask = Document.from_lengths(lengths) if known else Document(torch.tensor(ids))
    return Case(mask, lambda b, q, k: ids[b % len(ids)][q] == ids[b % len(ids)][k])


def cases(batch: int) -> st.SearchStrategy[Case]:
    """Every kind of mask, and what is composed of them."""
    simple = st.just(Case(Causal(), lambda b, q, k: k <= q)) | windows(batch) | blocks(batch) | documents(batch)

    def composed(parts: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
        both = st.builds(
            lambda x, y: Case(x.mask & y.mask, lambda b, q, k: x.sees(b, q, k) and y.sees(b, q, k)), parts, parts
        )
        either = st.builds(
            lambda x, y: Case(x.mask | y.mask, lambda b, q, k: x.sees(b, q, k) or y.sees(b, q, k)), parts, parts
        )
        return both | either

    return st.recursive(simple, composed, max_leaves=3)


@dataclass(frozen=True)
class Laid:
    """A pattern, and the bool matrix (B, 1, Q, K) that it should be."""

    pattern: Pattern
    matrix: torch.Tensor


@st.composite
def laid(draw: st.DrawFn, whole: bool = False, case: Callable[[int], st.SearchStrategy[Case]] = cases) -> Laid:
    """A mask over queries that follow one another, at the end of sequences that are alike or of different lengths.

    With `whole` always the same queries as keys, as in a pass without a cache.
    """
    batch = draw(st.integers(1, 3))
    count = draw(st.integers(1, 5))
    drawn = draw(case(batch))
    if whole or draw(st.booleans()):
        start = 0 if whole else draw(st.integers(0, LENGTH - count))
        count = LENGTH if whole else count
        positions, keys, ends = [list(range(start, start + count))] * batch, start + count, None
        queries = start
    else:
        starts = draw(st.lists(st.integers(0, LENGTH - count), min_size=batch, max_size=batch))
        positions = [list(range(start, start + count)) for start in starts]
        keys, ends = max(starts) + count, tuple(start + count for start in starts)
        queries = torch.tensor(positions)
    pattern = Pattern(mask=drawn.mask, queries=queries, count=count, keys=keys, batch=batch, device=CPU, ends=ends)
    return Laid(pattern, drawn.matrix(positions, keys, ends))


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Softmax attention by its definition: (B, H, Q, C), (B, G, K, C) twice, bool (B, 1, Q, K) -> (B, H, Q, C)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = torch.einsum("bhqc,bhkc->bhqk", q, k) / q.shape[-1] ** 0.5
    return logits.masked_fill(~matrix, float("-inf")).softmax(-1) @ v
