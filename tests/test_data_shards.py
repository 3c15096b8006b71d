"""Shards on disk: written by any number of processes alike, read as one stream, and checked."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evo.data import BYTES, Encoding, FilePart, TokenShards, write_shards
from evo.files import read_json
from tests.data_cases import LETTERS, letters, of_lengths, texts

words = st.lists(st.text("abcdefz", max_size=20), min_size=1, max_size=20)


def nothing(text: str) -> list[int]:
    return []


def outside(text: str) -> list[int]:
    return [3, 28]


def failing(text: str) -> list[int]:
    raise ArithmeticError(f"cannot encode {text[:3]!r}")


@settings(max_examples=25)
@given(documents=words.filter(any), shard_bytes=st.integers(1, 60), data=st.data())
def test_what_is_written_is_read(documents, shard_bytes, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    shards = write_shards(iter(documents), LETTERS, folder, shard_bytes=shard_bytes)
    kept = [[0, *letters(text), 1] for text in documents if text]
    stream = np.concatenate(kept)
    ends = np.cumsum([len(each) for each in kept])
    assert (shards.tokens, shards.documents, shards.bytes) == (len(stream), len(kept), sum(map(len, documents)))
    assert shards.read(0, shards.tokens).tolist() == stream.tolist()
    assert np.concatenate(list(shards.all_ends())).tolist() == ends.tolist()
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    part = shards.read(start, stop)
    assert part.tolist() == stream[start:stop].tolist()
    assert part.dtype == np.uint16
    assert shards.ends(start, stop).tolist() == [end for end in ends.tolist() if start < end < stop]
    shards.verify()
    again = TokenShards.open(folder)
    assert again.fingerprint == shards.fingerprint
    assert (again.bos, again.eos, again.vocabulary, again.encoding) == (0, 1, 28, "letters")


def test_any_number_of_workers_writes_the_same_files(tmp_path):
    long = tmp_path / "long.txt"
    long.write_bytes("zwölf Boxkämpfer\n".encode() * 50)
    documents = [*of_lengths(range(3, 60)), FilePart(long, 0, 400), FilePart(long, 400, 901), "", "é"]
    written = {}
    for workers in (1, 2):
        done = []
        folder = tmp_path / str(workers)
        shards = write_shards(iter(documents), BYTES, folder, workers=workers, shard_bytes=300, report=done.append)
        assert sum(done) == shards.bytes
        written[workers] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert written[1] == written[2]
    assert len(written[1]) > 10
    found = texts(shards)
    assert found[-3] + found[-2] == long.read_bytes()[:901]


@pytest.mark.slow
def test_an_error_in_a_worker_surfaces(tmp_path):
    broken = Encoding(encode=failing, vocabulary=28, bos=0, eos=1, fingerprint="broken")
    with pytest.raises(ArithmeticError, match="cannot encode 'abc'"):
        write_shards(["abc"] * 9, broken, tmp_path, workers=2, shard_bytes=1)
    with pytest.raises(FileNotFoundError, match=r"no shards\.json"):
        TokenShards.open(tmp_path)


def test_wide_vocabularies_have_wide_ids(tmp_path):
    wide = Encoding(encode=lambda text: [70_000], vocabulary=70_001, bos=0, eos=None, fingerprint="wide")
    shards = write_shards(["a", "b"], wide, tmp_path)
    assert shards.read(0, 4).tolist() == [0, 70_000, 0, 70_000]
    assert shards.dtype == np.dtype("<u4")
    assert shards.bytes_per_token == 1


def test_what_was_there_before_is_replaced(tmp_path):
    write_shards(of_lengths([20] * 9), LETTERS, tmp_path, shard_bytes=1)
    (tmp_path / "00007.tokens.tmp").write_bytes(b"what a kill left")
    (tmp_path / "notes.txt").write_text("not ours")
    write_shards(["ab", "cd"], LETTERS, tmp_path, shard_bytes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.ends",
        "00000.tokens",
        "00001.ends",
        "00001.tokens",
        "notes.txt",
        "shards.json",
    ]


def test_an_unfinished_folder_does_not_count(tmp_path):
    write_shards(["ab"], LETTERS, tmp_path)

    def cut_off():
        yield "cd"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(cut_off(), LETTERS, tmp_path, shard_bytes=1)
    with pytest.raises(FileNotFoundError, match="their writing was cut off"):
        TokenShards.open(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    write_shards(of_lengths([9] * 6), LETTERS, folder, shard_bytes=14)
    return folder


def damaged(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "damaged")
    return tmp_path / "damaged"


@given(data=st.data())
def test_a_flipped_byte_is_found_and_named(sound, data, tmp_path_factory):
    folder = damaged(sound, tmp_path_factory.mktemp("copy"))
    path = folder / data.draw(st.sampled_from(["00000.tokens", "00002.ends", "00001.tokens"]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} is not as it was written"):
        TokenShards.open(folder).verify()


def test_a_file_cut_short_or_missing_is_found_at_once(sound, tmp_path):
    folder = damaged(sound, tmp_path)
    path = folder / "00001.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"00001.tokens has 34 bytes and should have 36"):
        TokenShards.open(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001\.tokens is missing"):
        TokenShards.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 7}, "has format 7"),
        ({"dtype": "<i8"}, "says that ids are '<i8'"),
        ({"shards": []}, "names no shards"),
        ({"shards": [{"tokens": "many"}]}, "not what was written there"),
        ({"vocabulary": -1}, "-1 where an integer of at least 1"),
        ({"bos": True}, "True where an integer"),
        ({"bytes": None}, "None where an integer"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(sound, tmp_path, change, message):
    folder = damaged(sound, tmp_path)
    facts = read_json(folder / "shards.json", 1 << 20)
    (folder / "shards.json").write_text(json.dumps(facts | change))
    with pytest.raises(ValueError, match=message):
        TokenShards.open(folder)


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(ValueError, match="there is no text to write"):
        write_shards(["", ""], LETTERS, tmp_path)
    with pytest.raises(ValueError, match="there is no text"):
        write_shards(["a"], Encoding(encode=nothing, vocabulary=2, bos=0, eos=1, fingerprint=""), tmp_path)
    with pytest.raises(ValueError, match=r"ids of shape \(2,\) between 3 and 28"):
        write_shards(["a"], Encoding(encode=outside, vocabulary=28, bos=0, eos=1, fingerprint=""), tmp_path)
    with pytest.raises(ValueError, match="workers is 0"):
        write_shards(["a"], LETTERS, tmp_path, workers=0)
    with pytest.raises(ValueError, match="eos is 3; ids of this vocabulary"):
        Encoding(encode=letters, vocabulary=3, bos=0, eos=3, fingerprint="")
    with pytest.raises(ValueError, match="vocabulary of 0 entries"):
        Encoding(encode=letters, vocabulary=0, bos=0, eos=None, fingerprint="")
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match="at least 9 bytes a moment ago"):
        FilePart(path, 0, 9).read("replace")
    shards = write_shards(["ab"], LETTERS, tmp_path)
    with pytest.raises(IndexError, match="tokens 2 to 9 of a stream of 4"):
        shards.read(2, 9)
