"""Texts on disk to a corpus: which files, which side, what is kept, and the batches of a run."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo.data import BestFit, Contiguous, Corpus, CorpusConfig, FilePart, open_corpus, sources, write_shards
from evo.text import BOS
from tests.data_cases import LETTERS, corpus, of_lengths, texts, write

ANY = CorpusConfig()
contents = st.binary(min_size=1, max_size=40).filter(lambda data: b"\0" not in data)
names = st.text("abcdefgh", min_size=1, max_size=6)


@settings(max_examples=15)
@given(files=st.dictionaries(names, contents, min_size=2, max_size=12))
def test_every_document_of_a_folder_is_on_one_side_whole(files, tmp_path_factory):
    source = write(tmp_path_factory.mktemp("source"), files)
    found = open_corpus(source, tmp_path_factory.mktemp("cache"), ANY, shard_bytes=30)
    train, held_out = texts(found.train), texts(found.held_out)
    assert sorted(train + held_out) == sorted(files.values())
    assert train
    assert held_out


@settings(max_examples=10)
@given(share=st.floats(0.1, 0.9))
def test_a_file_stays_on_its_side_when_others_come(share, tmp_path_factory):
    few = {f"{i}.txt": b"%d" % i for i in range(60)}
    more = few | {f"new/{i}.txt": b"new %d" % i for i in range(60)}
    config = CorpusConfig(held_out=share)
    sides = []
    for files in (few, more):
        source = write(tmp_path_factory.mktemp("source"), files)
        found = open_corpus(source, tmp_path_factory.mktemp("cache"), config)
        sides.append((set(texts(found.train)), set(texts(found.held_out))))
    assert sides[0][0] <= sides[1][0]
    assert sides[0][1] <= sides[1][1]


def test_the_share_held_out_is_the_one_asked_for(tmp_path):
    source = write(tmp_path / "source", {f"{i}": b"%d" % i for i in range(1000)})
    found = open_corpus(source, tmp_path / "cache", CorpusConfig(held_out=0.2))
    # Five standard deviations of a binomial count.
    assert abs(found.held_out.documents - 200) < 5 * (1000 * 0.2 * 0.8) ** 0.5


def test_a_single_file_is_split_by_position(tmp_path):
    text = bytes(range(65, 91)) * 40
    path = write(tmp_path, {"text": text}) / "text"
    found = open_corpus(path, tmp_path / "cache", CorpusConfig(held_out=0.25))
    (train,), (held_out,) = texts(found.train), texts(found.held_out)
    assert train + held_out == text
    assert len(held_out) == len(text) // 4


def test_a_long_file_is_several_documents_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LONGEST", 100)
    monkeypatch.setattr(sources, "_LINE", 30)
    lines = b"".join(b"line %d of this text\n" % i for i in range(50))
    path = write(tmp_path, {"text": lines + b"x" * 250}) / "text"
    found = open_corpus(path, tmp_path / "cache", CorpusConfig(held_out=0.01))
    train = texts(found.train)
    assert b"".join(train + texts(found.held_out)) == lines + b"x" * 250
    assert all(70 <= len(each) <= 100 for each in train[:-1])
    assert all(each.endswith(b"\n") for each in train[:-4])


def test_what_is_no_text_is_passed_over(tmp_path):
    files = {
        "a.py": b"a",
        "b/c.py": b"c",
        "b/d.md": b"d",
        "b/e.so": b"\x7fELF\0",
        "empty.py": b"",
        "__pycache__/f.py": b"f",
        "site-packages/g.py": b"g",
        ".git/h.py": b"h",
        ".i.py": b"i",
    }
    source = write(tmp_path / "source", files)
    (source / "dangling.py").symlink_to(tmp_path / "nowhere")

    def found(config):
        opened = open_corpus(source, tmp_path / "cache", config)
        return sorted(texts(opened.train) + texts(opened.held_out))

    assert found(ANY) == [b"a", b"c", b"d"]
    assert found(CorpusConfig(suffixes=(".py",))) == [b"a", b"c"]
    assert found(CorpusConfig(exclude=("b",))) == [b"a", b"f", b"g"]


def test_tokens_are_reused_until_the_source_changes(tmp_path):
    source = write(tmp_path / "source", {"a": b"one", "b": b"two", "c": b"three"})
    cache = tmp_path / "cache"
    first = open_corpus(source, cache, ANY)
    before = sorted(texts(first.train) + texts(first.held_out))
    made = os.stat(cache / "train" / "00000.tokens").st_ino
    again = open_corpus(source, cache, CorpusConfig(packing="best_fit"))
    assert os.stat(cache / "train" / "00000.tokens").st_ino == made
    assert again.fingerprint == first.fingerprint
    assert again.packing == BestFit()
    write(source, {"b": b"other"})
    changed = open_corpus(source, cache, ANY)
    assert changed.fingerprint != first.fingerprint
    assert b"other" in texts(changed.train) + texts(changed.held_out)
    # The maps handed out before still show what they did.
    assert sorted(texts(first.train) + texts(first.held_out)) == before


@pytest.mark.parametrize("damaged", ["train/00000.tokens", "train/shards.json", "source.json"])
def test_a_cache_cut_short_is_made_anew(tmp_path, damaged):
    source = write(tmp_path / "source", {"a": b"one", "b": b"two"})
    cache = tmp_path / "cache"
    kept = texts(open_corpus(source, cache, ANY).train)
    with (cache / damaged).open("r+b") as file:
        file.truncate(2)
    assert texts(open_corpus(source, cache, ANY).train) == kept


@pytest.mark.parametrize("killed_at", ["evo.data.corpus.write_json", "evo.data.writing.write_manifest"])
def test_a_kill_before_the_end_leaves_nothing_half_valid(tmp_path, monkeypatch, killed_at):
    source = write(tmp_path / "source", {"a": b"one", "b": b"two"})
    cache = tmp_path / "cache"
    open_corpus(source, cache, ANY)
    write(source, {"a": b"1", "b": b"2"})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(killed_at, killed)
    with pytest.raises(KeyboardInterrupt):
        open_corpus(source, cache, ANY)
    monkeypatch.undo()
    found = open_corpus(source, cache, ANY)
    assert sorted(texts(found.train) + texts(found.held_out)) == [b"1", b"2"]


def test_a_prepared_folder_is_read_where_it_is(tmp_path):
    source = write(tmp_path / "source", {"a": b"one", "b": b"two"})
    made = open_corpus(source, tmp_path / "prepared", ANY)
    found = open_corpus(tmp_path / "prepared", tmp_path / "cache", ANY)
    assert found.fingerprint == made.fingerprint
    assert found.vocabulary == 259
    assert not (tmp_path / "cache").exists()
    manifest = json.loads((tmp_path / "prepared" / "train" / "shards.json").read_text())
    assert (manifest["tokens"], manifest["documents"]) == (found.train.tokens, found.train.documents)


def test_sides_of_different_tokenizers_are_refused(tmp_path):
    one = corpus(tmp_path, ["abc"])
    other = open_corpus(write(tmp_path / "source", {"a": b"one", "b": b"two"}), tmp_path / "cache", ANY)
    with pytest.raises(ValueError, match=r"tokenized by 'letters' and .* by 'utf-8 bytes"):
        Corpus(train=one.train, held_out=other.held_out)


def test_no_text_is_an_error_that_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder at .*nowhere"):
        open_corpus(tmp_path / "nowhere", tmp_path / "cache", ANY)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty is empty"):
        open_corpus(tmp_path / "empty", tmp_path / "cache", ANY)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder holds no text files ending in \.py"):
        open_corpus(tmp_path / "folder", tmp_path / "cache", CorpusConfig(suffixes=(".py",)))
    with pytest.raises(ValueError, match=r"held_out is 1\.5"):
        CorpusConfig(held_out=1.5)
    with pytest.raises(ValueError, match=r"corpus\.packing is 'tight'; needed: contiguous or best_fit"):
        CorpusConfig(packing="tight")


@given(size=st.integers(1, 60), share=st.floats(0.001, 0.999))
def test_a_file_too_short_to_be_split_is_named_with_the_share(size, share, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("source"), {"text": b"a" * size}) / "text"
    try:
        found = sources.survey(path, CorpusConfig(held_out=share), "an encoding")
    except ValueError as error:
        held_out = re.search(rf"{path} has {size} bytes, of which corpus\.held_out .* holds out (\d+);", str(error))
        assert int(held_out[1]) in (0, size)
        return
    assert found.train
    assert found.held_out


@pytest.mark.parametrize("inner", ["", "runs/evo/data"])
def test_a_run_does_not_read_what_it_writes(tmp_path, inner):
    source = write(tmp_path / "source", {"a.py": b"one", "b.py": b"two"})
    with pytest.raises(
        ValueError, match=r"lies in .*source, .* give an output folder elsewhere, or say with corpus\.suffixes"
    ):
        open_corpus(source, source / inner, ANY)
    for place, config in ((".runs/data", ANY), ("runs/data", CorpusConfig(exclude=("runs",)))):
        made = [open_corpus(source, source / place, config).fingerprint for _ in range(2)]
        assert made[0] == made[1]
    if inner:
        assert open_corpus(source, source / inner, CorpusConfig(suffixes=(".py",))).train.documents == 1


# Batches.

LENGTHS = st.lists(st.integers(3, 30), min_size=1, max_size=12)


@settings(max_examples=15)
@given(
    lengths=LENGTHS,
    packing=st.sampled_from([Contiguous(), BestFit(), BestFit(buffer=2)]),
    length=st.integers(1, 12),
    total=st.integers(1, 7),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_each_row_of_a_batch_depends_on_nothing_but_its_number(
    lengths, packing, length, total, seed, data, tmp_path_factory
):
    found = corpus(tmp_path_factory.mktemp("data"), of_lengths([max(length, lengths[0], 3), *lengths]), packing)
    step = data.draw(st.integers(0, 2**30))
    whole = found.batch(seed, step, range(total), total, length)
    rows = data.draw(st.lists(st.sampled_from(range(total)), min_size=1, max_size=total, unique=True))
    some = found.batch(seed, step, rows, total, length)
    for name in ("tokens", "documents", "loss_mask"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[rows])
    # The same run in batches of one.
    alone = found.batch(seed, step * total + rows[0], [0], 1, length)
    assert torch.equal(alone.tokens[0], some.tokens[0])
    assert some.tokens.dtype == some.documents.dtype == torch.int64
    assert some.tokens.shape == some.documents.shape == some.loss_mask.shape == (len(rows), length)


@settings(max_examples=15)
@given(lengths=LENGTHS, packing=st.sampled_from([Contiguous(), BestFit(buffer=3)]), length=st.integers(1, 9))
def test_an_epoch_has_every_token_of_its_rows_once(lengths, packing, length, tmp_path_factory):
    documents = of_lengths([max(length, 3), *lengths])
    found = corpus(tmp_path_factory.mktemp("data"), documents, packing)
    count = found.rows(length)
    stream = found.train.read(0, found.train.tokens)
    for epoch in range(2):
        seen = [found.batch(3, epoch * count + step, [0], 1, length) for step in range(count)]
        tokens = torch.cat([batch.tokens[batch.loss_mask] for batch in seen])
        missing = np.bincount(stream, minlength=28) - torch.bincount(tokens, minlength=28).numpy()
        assert (missing >= 0).all()
        # What Contiguous leaves over is less than a row; BestFit leaves nothing.
        assert missing.sum() == (0 if isinstance(packing, BestFit) else found.train.tokens % length)


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path):
    found = corpus(tmp_path, of_lengths([40] * 20))
    count = found.rows(8)

    def epoch(seed, number):
        return found.batch(seed, number, range(count), count, 8).tokens

    assert not torch.equal(epoch(0, 0), epoch(0, 1))
    assert not torch.equal(epoch(0, 0), epoch(1, 0))
    assert torch.equal(epoch(0, 1), epoch(0, 1))


@given(tokens=st.integers(3, 300), count=st.integers(1, 40), length=st.integers(1, 50))
def test_held_out_rows_do_not_overlap(tokens, count, length, tmp_path_factory):
    found = corpus(tmp_path_factory.mktemp("data"), ["abc"], held_out="".join(of_lengths([tokens])))
    if tokens < length:
        with pytest.raises(
            ValueError, match=rf"held_out has {tokens} tokens, a sequence needs {length}: .*corpus\.held_out"
        ):
            found.held_out_batch(count, length)
        return
    rows = found.held_out_batch(count, length)
    assert rows.tokens.shape == (min(count, tokens // length), length)
    assert rows.loss_mask.all()
    stream = found.held_out.read(0, tokens).astype(np.int64)
    places = range(0, tokens - length + 1, length)
    crops = [tuple(stream[at : at + length].tolist()) for at in places]
    found_rows = [tuple(row) for row in rows.tokens.tolist()]
    assert all(row in crops for row in found_rows)
    assert found_rows[0] == crops[0]
    assert found_rows[-1] == crops[len(crops) - 1 if len(found_rows) > 1 else 0]


def test_what_does_not_fit_is_said(tmp_path):
    found = corpus(tmp_path, ["abc"])
    for packing in (Contiguous(), BestFit()):
        short = Corpus(train=found.train, held_out=found.held_out, packing=packing)
        with pytest.raises(ValueError, match="train has 5 tokens, a sequence needs 8"):
            short.batch(0, 0, range(2), 2, 8)
    for rows in ([], [2], [-1]):
        with pytest.raises(ValueError, match=r"rows \[.*\] of a batch of 2"):
            found.batch(0, 0, rows, 2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos": None}, "bos is None; the id of a token is needed$"),
        ({"eos": 1.0}, "eos is 1.0; the id of a token is needed, or None"),
        ({"encode": 3}, "encode is 3; a function from a text to its ids"),
    ],
)
def test_an_encoding_that_is_none_is_refused(changes, message):
    with pytest.raises(TypeError, match=message):
        replace(LETTERS, **changes)


@pytest.mark.parametrize("ids", [[0.9, 1.7], ["a"], [None], [True], [2**70]])
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(TypeError, match="integers are needed"):
        replace(LETTERS, encode=lambda text: ids).document("a")


def test_one_text_is_not_several(tmp_path):
    for one in ("the cat", FilePart(tmp_path / "x", 0, 3)):
        with pytest.raises(TypeError, match="give a list of texts"):
            write_shards(one, LETTERS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_need_nothing_of_the_model():
    code = "import sys, evo.data; sys.exit(any(name.startswith('evo.core') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bytes_per_token_leaves_out_what_is_no_text(tmp_path):
    source = write(tmp_path / "source", {"a": "é".encode() * 9, "b": b"two"})
    found = open_corpus(source, tmp_path / "cache", ANY)
    for side in (found.train, found.held_out):
        ids = side.read(0, side.tokens)
        assert side.bytes_per_token == 1
        assert side.bytes == (ids < BOS).sum()
