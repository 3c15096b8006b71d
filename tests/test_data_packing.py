"""Where cuts fall, how full rows are, and the order in which they come."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo.data import BestFit, Contiguous, Packed
from evo.data.order import epoch_key, permuted
from evo.data.packing import fill
from tests.data_cases import corpus, of_lengths

LENGTHS = st.lists(st.integers(3, 40), min_size=1, max_size=25)
KEYS = st.integers(0, 2**64 - 1)


def layout(folder, lengths, packing, length):
    found = corpus(folder, of_lengths(lengths), packing)
    return found.train, packing.rows(found.train, length)


@settings(max_examples=15)
@given(lengths=LENGTHS, length=st.integers(1, 30), key=KEYS)
def test_contiguous_rows_are_the_stream_cut_and_nothing_else(lengths, length, key, tmp_path_factory):
    lengths = [max(length, 3), *lengths]
    shards, rows = layout(tmp_path_factory.mktemp("data"), lengths, Contiguous(), length)
    assert rows.count == sum(lengths) // length
    segments = [segment for row in range(rows.count) for segment in rows.segments(row, key)]
    places = [place for start, stop in segments for place in range(start, stop)]
    assert len(set(places)) == len(places) == rows.count * length
    assert places == [(key + step) % shards.tokens for step in range(len(places))]
    edges = {0, *np.cumsum(lengths).tolist()}
    begun = {(key + row * length) % shards.tokens for row in range(rows.count)}
    # A segment begins where a document or a row does, and no document ends within one.
    assert all(start in edges | begun for start, _ in segments)
    assert not any(start < edge < stop for start, stop in segments for edge in edges)


@settings(max_examples=20)
@given(lengths=LENGTHS, length=st.integers(3, 30), buffer=st.integers(1, 30))
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, length, buffer, tmp_path_factory):
    lengths = [max(length, 3), *lengths]
    shards, rows = layout(tmp_path_factory.mktemp("data"), lengths, BestFit(buffer=buffer), length)
    segments = [rows.segments(row, 0) for row in range(rows.count)]
    sizes = [sum(stop - start for start, stop in row) for row in segments]
    assert max(sizes) <= length
    places = sorted(place for row in segments for start, stop in row for place in range(start, stop))
    assert places == list(range(shards.tokens))
    ends = np.cumsum(lengths)
    expected = []
    for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        cuts = [*range(begin, end, length), end]
        expected += list(itertools.pairwise(cuts))
    assert sorted(segment for row in segments for segment in row) == sorted(expected)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(3, 30), min_size=1, max_size=60), length=st.just(30))
def test_best_fit_uses_few_rows(lengths, length, tmp_path_factory):
    found = corpus(tmp_path_factory.mktemp("data"), of_lengths([30, *lengths]), BestFit(), shard_bytes=1 << 20)
    rows = found.packing.rows(found.train, length)
    least = -(-(sum(lengths) + 30) // length)
    # Best-fit decreasing needs at most 11/9 of the fewest possible and 4 (Johnson et al. 1974); the fewest are at least `least`, and at
    # least as many as there are pieces longer than half a row.
    fewest = max(least, 1 + sum(each > length / 2 for each in lengths))
    assert rows.count <= 11 / 9 * fewest + 4
    filled = [sum(stop - start for start, stop in rows.segments(row, 0)) for row in range(rows.count)]
    # No two rows would fit into one.
    assert sum(sorted(filled)[:2]) > length or rows.count == 1


@settings(max_examples=20)
@given(lengths=LENGTHS, packing=st.sampled_from([Contiguous(), BestFit()]), length=st.integers(3, 20), key=KEYS)
def test_documents_of_a_row_are_numbered_and_padding_is_masked(lengths, packing, length, key, tmp_path_factory):
    shards, rows = layout(tmp_path_factory.mktemp("data"), [length, *lengths], packing, length)
    segments = [rows.segments(row, key) for row in range(rows.count)]
    packed = fill(shards, segments, length)
    for row, parts in enumerate(segments):
        at = 0
        for number, (start, stop) in enumerate(parts):
            end = at + stop - start
            assert packed.tokens[row, at:end].tolist() == shards.read(start, stop).tolist()
            assert (packed.documents[row, at:end] == number).all()
            at = end
        assert packed.loss_mask[row].tolist() == [True] * at + [False] * (length - at)
        assert (packed.tokens[row, at:] == shards.bos).all()
        assert (packed.documents[row, at:] == len(parts)).all()
        assert packed.lengths[row] == at
    some = packed.rows(slice(0, 1))
    assert torch.equal(some.tokens, packed.tokens[:1])
    moved = packed.to("cpu")
    assert isinstance(moved, Packed)
    assert torch.equal(moved.documents, packed.documents)


def test_a_buffer_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"BestFit\(buffer=0\)"):
        BestFit(buffer=0)


# Order.


@settings(max_examples=40)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64), epoch=st.integers(0, 2**30))
def test_an_epoch_is_a_permutation(size, seed, epoch):
    found = permuted(np.arange(size), size, seed, epoch)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(size))


@given(size=st.integers(1, 2**61), seed=st.integers(0, 99), data=st.data())
def test_a_place_is_computed_alone_and_at_any_size(size, seed, data):
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8, unique=True)))
    found = permuted(places, size, seed, 0)
    assert ((found >= 0) & (found < size)).all()
    assert len(set(found.tolist())) == len(places)
    assert [permuted(places[at : at + 1], size, seed, 0)[0] for at in range(len(places))] == found.tolist()


@pytest.mark.parametrize("size", [3, 7])
def test_every_row_comes_everywhere_as_often(size):
    runs = 600
    counts = np.zeros((size, size))
    pairs = np.zeros((size, size))
    for seed in range(runs):
        order = permuted(np.arange(size), size, seed, 1)
        counts[np.arange(size), order] += 1
        pairs[order[0], order[1]] += 1
    # Chi-square over all cells, five standard deviations above its mean; of neighbours too, which a shift would leave together.
    expected, freedom = runs / size, (size - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5
    expected, freedom = runs / (size * (size - 1)), size * (size - 1) - 1
    off = ~np.eye(size, dtype=bool)
    assert ((pairs[off] - expected) ** 2 / expected).sum() <= freedom + 5 * (2 * freedom) ** 0.5


def test_what_else_an_epoch_draws_differs_too():
    assert len({epoch_key(seed, epoch) for seed in range(20) for epoch in range(20)}) == 400
