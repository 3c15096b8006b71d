"""Masks and patterns against their definition as a boolean matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.core import BlockCausal, Causal, Document, Pattern, Window
from tests.attention_cases import CPU, LENGTH, Laid, blocks, cases, document_lengths, laid, windows


def pattern(mask, queries=0, count=LENGTH, keys=LENGTH, batch=1, ends=None) -> Pattern:
    return Pattern(mask=mask, queries=queries, count=count, keys=keys, batch=batch, device=CPU, ends=ends)


@given(laid())
def test_a_pattern_is_its_definition(case: Laid):
    assert torch.equal(case.pattern.matrix.expand_as(case.matrix), case.matrix)


def of_pieces(case: Pattern) -> torch.Tensor:
    """Bool (Q, K) by the definition of a piece."""
    seen = torch.zeros(case.count, case.keys, dtype=torch.bool)
    for piece in case.pieces:
        for row in range(piece.start, piece.stop):
            fewer = piece.stop - 1 - row if piece.causal else 0
            seen[row, : piece.keys - fewer] = True
    return seen


def simple(batch: int) -> st.SearchStrategy:
    return windows(batch) | blocks(batch) | cases(batch)


@given(laid(case=simple))
def test_pieces_are_the_whole_mask(case: Laid):
    if case.pattern.pieces is None:
        return
    rows = [row for piece in case.pattern.pieces for row in range(piece.start, piece.stop)]
    assert rows == list(range(case.pattern.count))
    assert torch.equal(of_pieces(case.pattern).expand_as(case.matrix), case.matrix)


@pytest.mark.parametrize(
    ("mask", "queries", "count", "keys", "shapes"),
    [
        (Causal(), 0, 6, 6, [(6, 6, True)]),
        (Causal(), 5, 1, 6, [(1, 6, False)]),
        (Causal(), 4, 2, 6, [(2, 6, True)]),
        (Window(0), 3, 3, 6, [(3, 6, False)]),
        (Window(1), 0, 6, 6, [(1, 1, False), (5, 6, False)]),
        (Window(4, 6), 0, 6, 6, [(4, 4, True), (2, 6, False)]),
        (BlockCausal(64, 1), 0, 130, 130, [(1, 1, False), (64, 65, False), (64, 129, False), (1, 130, False)]),
    ],
)
def test_common_masks_need_no_matrix(mask, queries, count, keys, shapes):
    found = pattern(mask, queries, count, keys).pieces
    assert [(piece.stop - piece.start, piece.keys, piece.causal) for piece in found] == shapes


@pytest.mark.parametrize(
    "mask",
    [Window(3, 5), Window(torch.tensor([2])), BlockCausal(2), Document.from_lengths([[4, 8]]), Causal() & Causal()],
)
def test_other_masks_have_no_pieces(mask):
    assert pattern(mask).pieces is None


@given(lengths=document_lengths(2))
def test_lengths_and_ids_are_the_same_documents(lengths):
    ids = [[index for index, length in enumerate(each) for _ in range(length)] for each in lengths]
    assert Document.from_lengths(lengths).ids.tolist() == ids


@given(first=cases(2), second=cases(2), third=cases(2))
def test_composition_is_logic(first, second, third):
    def matrix(mask):
        return pattern(mask, batch=2).matrix.expand(2, 1, LENGTH, LENGTH)

    a, b, c = first.mask, second.mask, third.mask
    assert torch.equal(matrix((a & b) | c), (matrix(a) & matrix(b)) | matrix(c))
    assert torch.equal(matrix((a | c) & (b | c)), matrix((a & b) | c))


@given(first=cases(3), second=cases(3))
def test_a_mask_that_says_so_is_the_same_in_every_sequence(first, second):
    for mask in (first.mask, first.mask & second.mask, first.mask | second.mask):
        if not mask.per_sequence:
            assert pattern(mask, batch=3).matrix.shape[0] == 1


def test_block_causal_of_one_is_causal_and_of_all_is_a_window():
    assert torch.equal(pattern(BlockCausal(1)).matrix, pattern(Causal()).matrix)
    assert torch.equal(pattern(BlockCausal(LENGTH, 3)).matrix, pattern(Window(3)).matrix)


def test_queries_may_stand_anywhere():
    """A pass over some tokens of a window, others in each sequence: their keys and values are in the cache already."""
    positions = torch.tensor([[3, 5, 5], [2, 3, 4]])
    found = pattern(Window(3, torch.tensor([6, 4])), positions, 3, 6, batch=2).matrix[:, 0].int().tolist()
    assert found == [
        [[1, 1, 1, 1, 1, 1]] * 3,
        [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pattern(Window(torch.tensor([1, 2]))), r"Window\(prompt=...\) has shape \(2,\); a batch of 1"),
        (lambda: pattern(Window(1, torch.tensor([[2]]))), r"Window\(length=...\) has shape \(1, 1\)"),
        (lambda: pattern(BlockCausal(2, torch.tensor([1, 2]))), r"BlockCausal\(prompt=...\) has shape \(2,\)"),
        (lambda: pattern(Document(torch.zeros(2, LENGTH))), r"ids have shape \(2, 12\); 1 sequences of 12 positions"),
        (lambda: pattern(Causal() & Document(torch.zeros(1, 3))), r"ids have shape \(1, 3\)"),
        (lambda: pattern(Causal() | Document(torch.zeros(1, 3))), r"ids have shape \(1, 3\)"),
        (lambda: BlockCausal(0), r"BlockCausal\(size=0\)"),
        (lambda: Document.from_lengths([[2, 3], [4]]), "do not fill sequences of one length"),
        (lambda: Document.from_lengths([[2, 0]]), "lengths of at least 1"),
    ],
)
def test_masks_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
