import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo.text import BOS, EOS, ByteTokenizer
from evo.training import Corpus, CorpusConfig, open_corpus

tokenizer = ByteTokenizer()
ANY = CorpusConfig()


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def documents(stream):
    """The documents of a stream, each without its BOS and EOS, which are checked."""
    ends = np.flatnonzero(np.asarray(stream) == EOS)
    parts = np.split(np.asarray(stream), ends + 1)
    assert len(parts.pop()) == 0
    assert all(part[0] == BOS and part[-1] == EOS for part in parts)
    return [tokenizer.decode_bytes(torch.from_numpy(part.astype(np.int64))) for part in parts]


contents = st.binary(min_size=1, max_size=40).filter(lambda data: b"\0" not in data)
names = st.text("abcdefgh", min_size=1, max_size=6)


@settings(max_examples=25)
@given(files=st.dictionaries(names, contents, min_size=2, max_size=12))
def test_every_document_of_a_folder_is_on_one_side_whole(files, tmp_path_factory):
    source = write(tmp_path_factory.mktemp("source"), files)
    corpus = open_corpus(source, tmp_path_factory.mktemp("cache"), ANY)
    train, held_out = documents(corpus.train), documents(corpus.held_out)
    assert sorted(train + held_out) == sorted(files.values())
    assert train
    assert held_out


@settings(max_examples=15)
@given(share=st.floats(0.1, 0.9))
def test_a_file_stays_on_its_side_when_others_come(share, tmp_path_factory):
    few = {f"{i}.txt": b"%d" % i for i in range(60)}
    more = few | {f"new/{i}.txt": b"new %d" % i for i in range(60)}
    config = CorpusConfig(held_out=share)
    sides = []
    for files in (few, more):
        source = write(tmp_path_factory.mktemp("source"), files)
        corpus = open_corpus(source, tmp_path_factory.mktemp("cache"), config)
        sides.append((set(documents(corpus.train)), set(documents(corpus.held_out))))
    assert sides[0][0] <= sides[1][0]
    assert sides[0][1] <= sides[1][1]


def test_the_share_held_out_is_the_one_asked_for(tmp_path):
    source = write(tmp_path / "source", {f"{i}": b"%d" % i for i in range(1000)})
    corpus = open_corpus(source, tmp_path / "cache", CorpusConfig(held_out=0.2))
    # Five standard deviations of a binomial count.
    assert abs(len(documents(corpus.held_out)) - 200) < 5 * (1000 * 0.2 * 0.8) ** 0.5


def test_a_single_file_is_split_by_position(tmp_path):
    text = bytes(range(65, 91)) * 40
    path = write(tmp_path, {"text": text}) / "text"
    corpus = open_corpus(path, tmp_path / "cache", CorpusConfig(held_out=0.25))
    (train,), (held_out,) = documents(corpus.train), documents(corpus.held_out)
    assert train + held_out == text
    assert len(held_out) == len(text) // 4


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
        corpus = open_corpus(source, tmp_path / "cache", config)
        return sorted(documents(corpus.train) + documents(corpus.held_out))

    assert found(ANY) == [b"a", b"c", b"d"]
    assert found(CorpusConfig(suffixes=(".py",))) == [b"a", b"c"]
    assert found(CorpusConfig(exclude=("b",))) == [b"a", b"f", b"g"]


def test_streams_are_reused_until_the_source_changes(tmp_path):
    source = write(tmp_path / "source", {"a": b"one", "b": b"two", "c": b"three"})
    cache = tmp_path / "cache"
    first = open_corpus(source, cache, ANY)
    made = os.stat(cache / "train.bin").st_ino
    again = open_corpus(source, cache, ANY)
    assert os.stat(cache / "train.bin").st_ino == made
    assert again.fingerprint == first.fingerprint
    write(source, {"b": b"other"})
    changed = open_corpus(source, cache, ANY)
    assert changed.fingerprint != first.fingerprint
    assert b"other" in documents(changed.train) + documents(changed.held_out)
    # The maps handed out before still show what they did.
    assert b"two" in documents(first.train) + documents(first.held_out)


def test_a_cache_cut_short_is_made_anew(tmp_path):
    source = write(tmp_path / "source", {"a": b"one", "b": b"two"})
    first = open_corpus(source, tmp_path / "cache", ANY)
    kept = np.array(first.train)
    with (tmp_path / "cache" / "train.bin").open("r+b") as file:
        file.truncate(2)
    again = open_corpus(source, tmp_path / "cache", ANY)
    assert np.array_equal(again.train, kept)


def test_a_kill_between_streams_and_manifest_leaves_nothing_half_valid(tmp_path, monkeypatch):
    source = write(tmp_path / "source", {"a": b"one", "b": b"two"})
    cache = tmp_path / "cache"
    open_corpus(source, cache, ANY)
    write(source, {"a": b"1", "b": b"2"})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("evo.training.data.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        open_corpus(source, cache, ANY)
    monkeypatch.undo()
    assert not (cache / "manifest.json").exists()
    corpus = open_corpus(source, cache, ANY)
    assert sorted(documents(corpus.train) + documents(corpus.held_out)) == [b"1", b"2"]


def test_the_manifest_says_how_much_there_is(tmp_path):
    source = write(tmp_path / "source", {"a": b"one", "b": b"three"})
    corpus = open_corpus(source, tmp_path / "cache", ANY)
    streams = json.loads((tmp_path / "cache" / "manifest.json").read_text())["streams"]
    assert streams["train"]["tokens"] == len(corpus.train)
    assert streams["train"]["documents"] + streams["held_out"]["documents"] == 2


@given(seed=st.integers(0, 2**40), step=st.integers(0, 2**40), size=st.integers(1, 6), length=st.integers(1, 100))
def test_batches_are_crops_and_depend_on_seed_and_step_alone(seed, step, size, length):
    stream = np.arange(100, dtype=np.uint16)
    corpus = Corpus(train=stream, held_out=stream, fingerprint="")
    batch = corpus.batch(seed, step, size, length)
    assert batch.shape == (size, length)
    assert batch.dtype == torch.int64
    assert torch.equal(batch - batch[:, :1], torch.arange(length).expand(size, length))
    assert torch.equal(batch, corpus.batch(seed, step, size, length))


def test_every_place_is_reached_and_steps_differ():
    stream = np.arange(12, dtype=np.uint16)
    corpus = Corpus(train=stream, held_out=stream, fingerprint="")
    starts = [corpus.batch(0, step, 8, 4)[:, 0] for step in range(50)]
    counts = torch.bincount(torch.cat(starts), minlength=9)
    assert len(counts) == 9
    # 400 draws over 9 places: five standard deviations around 44.4.
    assert (counts - 400 / 9).abs().max() < 5 * (400 / 9 * 8 / 9) ** 0.5
    assert not torch.equal(corpus.batch(0, 1, 8, 4), corpus.batch(1, 1, 8, 4))


@given(tokens=st.integers(1, 300), count=st.integers(1, 40), length=st.integers(1, 50))
def test_held_out_crops_do_not_overlap(tokens, count, length):
    stream = np.arange(tokens, dtype=np.uint16)
    corpus = Corpus(train=stream, held_out=stream, fingerprint="")
    if tokens < length:
        with pytest.raises(ValueError, match=f"{tokens} tokens, a sequence needs {length}"):
            corpus.held_out_batch(count, length)
        return
    crops = corpus.held_out_batch(count, length)
    assert crops.shape == (min(count, tokens // length), length)
    assert len(crops.flatten().unique()) == crops.numel()


def test_a_text_shorter_than_a_sequence_is_an_error():
    corpus = Corpus(train=np.zeros(5, np.uint16), held_out=np.zeros(5, np.uint16), fingerprint="")
    with pytest.raises(ValueError, match="training text has 5 tokens, a sequence needs 8"):
        corpus.batch(0, 0, 2, 8)


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
