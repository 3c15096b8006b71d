"""Streams that are never written, batches made ahead of time, and what comes from the hub."""

import importlib
import itertools
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo.data import Prefetch, StreamState, huggingface_encoding, huggingface_texts, load, stream_batches, write_shards
from tests.data_cases import LETTERS, corpus, letters, of_lengths, word_tokenizer

words = st.lists(st.text("abcdefz", max_size=20), min_size=1, max_size=25)


@settings(max_examples=40)
@given(documents=words, total=st.integers(1, 4), length=st.integers(1, 9), data=st.data())
def test_a_stream_goes_on_where_its_state_says(documents, total, length, data):
    def batches(**given):
        return list(stream_batches(iter(documents), LETTERS, rows=range(total), total=total, length=length, **given))

    whole = batches()
    stream = [token for text in documents if text for token in [0, *letters(text), 1]]
    size = total * length
    assert len(whole) == len(stream) // size
    assert [token for batch, _ in whole for token in batch.tokens.flatten().tolist()] == stream[: len(whole) * size]
    # Within a row a document begins with its BOS, and nowhere else.
    for batch, _ in whole:
        begins = batch.documents.diff(dim=1) != 0
        assert torch.equal(begins, batch.tokens[:, 1:] == 0)
        assert batch.loss_mask.all()
    if whole:
        at = data.draw(st.integers(0, len(whole) - 1))
        state = whole[at][1]
        rest = batches(state=state)
        already = list(
            stream_batches(
                documents[state.texts :],
                LETTERS,
                rows=range(total),
                total=total,
                length=length,
                state=state,
                skipped=state.texts,
            )
        )
        assert len(rest) == len(already) == len(whole) - at - 1
        for (one, one_state), (two, two_state), (three, three_state) in zip(
            rest, already, whole[at + 1 :], strict=True
        ):
            assert torch.equal(one.tokens, three.tokens)
            assert torch.equal(two.tokens, three.tokens)
            assert torch.equal(one.documents, three.documents)
            assert one_state == two_state == three_state


@given(total=st.integers(1, 5), data=st.data())
def test_ranks_of_a_stream_share_its_batches(total, data):
    row = data.draw(st.integers(0, total - 1))
    endless = itertools.cycle(of_lengths([9, 4, 30]))
    whole = stream_batches(endless, LETTERS, rows=range(total), total=total, length=7)
    mine = stream_batches(itertools.cycle(of_lengths([9, 4, 30])), LETTERS, rows=[row], total=total, length=7)
    for (all_rows, state), (one, one_state) in itertools.islice(zip(whole, mine, strict=True), 6):
        assert torch.equal(all_rows.tokens[row : row + 1], one.tokens)
        assert state == one_state


def test_what_a_stream_cannot_do_is_said_at_once():
    with pytest.raises(ValueError, match=r"rows \[2\] of a batch of 2"):
        stream_batches([], LETTERS, rows=[2], total=2, length=4)
    with pytest.raises(ValueError, match="3 texts were skipped, 2 have been used"):
        stream_batches([], LETTERS, rows=[0], total=2, length=4, state=StreamState(texts=2), skipped=3)


# Ahead of time.


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "evo-prefetch"]


@given(count=st.integers(0, 20), ahead=st.integers(1, 5))
def test_items_come_in_order_and_then_no_more(count, ahead):
    with Prefetch(range(count), ahead=ahead) as items:
        assert list(items) == list(range(count))
        assert list(items) == []
    assert not prefetch_threads()


def test_it_is_no_further_ahead_than_it_may_be():
    made = []

    def items():
        for index in itertools.count():
            made.append(index)
            yield index

    with Prefetch(items(), ahead=3) as ahead:
        deadline = time.monotonic() + 20
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        # Three wait, and one is in the hand of the thread.
        assert made == [0, 1, 2, 3]
        assert next(ahead) == 0
    assert not prefetch_threads()


def test_an_error_comes_where_its_item_would_have():
    def items():
        yield 1
        raise OSError("the disk is gone")

    ahead = Prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    assert list(ahead) == []
    assert not prefetch_threads()
    with pytest.raises(ValueError, match="ahead is 0"):
        Prefetch([], ahead=0)


def test_it_closes_while_it_waits_and_twice():
    ahead = Prefetch(itertools.count())
    assert next(ahead) == 0
    ahead.close()
    ahead.close()
    assert not prefetch_threads()


def test_loaded_batches_are_those_of_the_corpus(tmp_path):
    found = corpus(tmp_path, of_lengths([30] * 9))
    with load(found, 5, range(3, 9), [1, 2], 4, 8) as batches:
        for step, batch in zip(range(3, 9), batches, strict=True):
            assert torch.equal(batch.tokens, found.batch(5, step, [1, 2], 4, 8).tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_for_a_gpu_batches_are_pinned(tmp_path):
    found = corpus(tmp_path, of_lengths([30] * 9))
    with load(found, 5, range(2), [0], 4, 8, device="cuda") as batches:
        batch = next(batches)
        assert batch.tokens.is_pinned()
        assert batch.documents.is_pinned()
        assert torch.equal(batch.to("cuda").tokens.cpu(), batch.tokens)


# The hub.


def test_a_tokenizer_of_transformers_encodes_documents(tmp_path):
    tokenizer = word_tokenizer()
    encoding = huggingface_encoding(tokenizer)
    shards = write_shards(["one two", "two three"], encoding, tmp_path)
    assert shards.read(0, shards.tokens).tolist() == [0, 3, 4, 1, 0, 4, 2, 1]
    assert shards.vocabulary == 5
    assert shards.bytes_per_token == len("one twotwo three") / 4
    assert huggingface_encoding(tokenizer, bos=2).bos == 2
    tokenizer.save_pretrained(tmp_path / "saved")
    again = huggingface_encoding(str(tmp_path / "saved"))
    assert again.fingerprint == encoding.fingerprint
    assert np.array_equal(again.document("two one"), [0, 4, 3, 1])


def test_tokenizers_that_do_not_do_are_named():
    with pytest.raises(ValueError, match="SimpleNamespace is no fast tokenizer"):
        huggingface_encoding(SimpleNamespace(is_fast=False))
    bare = SimpleNamespace(is_fast=True, bos_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match="neither a bos nor an eos"):
        huggingface_encoding(bare)


class Rows(list):
    """Stands in for a streamed data set."""

    def skip(self, count):
        return Rows(self[count:])


def test_data_sets_of_the_hub_are_streams_of_texts(monkeypatch):
    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return Rows({"text": text} for text in ("a", "b", "c"))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(huggingface_texts("some/texts", skip=1, revision="main")) == ["b", "c"]
    assert asked == {"name": "some/texts", "split": "train", "streaming": True, "revision": "main"}
    with pytest.raises(ValueError, match="some/texts has no column 'body'; it has 'text'"):
        list(huggingface_texts("some/texts", column="body"))


def test_without_the_extra_it_is_named(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"needs datasets: pip install 'evo-lm\[data\]'"):
        huggingface_texts("some/texts")
