"""Files from strangers: whatever they say, they are refused before memory is taken, or they are the model that was saved."""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from evo import Evo
from evo.core import shards as shards_module
from evo.core.serialization import _json_sha256
from evo.core.shards import Shards
from evo.core.sizes import blueprint
from evo.files import DEPTH_LIMIT, parse_json, read_json, sha256
from tests.conftest import random_model

REFUSED = (ValueError, FileNotFoundError)
HUGE = [0, -1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**64, 10**30]
NOT_SIZES = [True, None, 1.5, 1e300, "8", "", [], [8], {}, {"name": "cosine"}, {"name": []}, {"name": {}}]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text("a1-", max_size=4)
VALUES = st.sampled_from(HUGE + NOT_SIZES) | SCALARS | st.lists(SCALARS, max_size=2)


@contextmanager
def little_memory(allowance: int = 192 << 20):
    """Within, this process can take no more than `allowance` bytes beyond what it has: what asks for them fails."""
    if not sys.platform.startswith("linux"):
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + allowance, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    random_model().save_pretrained(path)
    return path


@cache
def expected():
    return random_model().state_dict()


def pieces(path):
    """Manifest, header and body of a saved model."""
    (file,) = path.glob("*.safetensors")
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads((path / "config.json").read_text()), json.loads(data[8 : 8 + length]), data[8 + length :]


def written(path, manifest, header, body, length=None):
    """A model of these pieces that vouches for itself: every digest fits."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = path / manifest["weights"]
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    manifest = {**manifest, "sha256": sha256(file), "config_sha256": _json_sha256(manifest["config"])}
    (path / "config.json").write_text(json.dumps(manifest))
    return path


def same_or_refused(path):
    try:
        with little_memory():
            loaded = Evo.from_pretrained(path).state_dict()
    except REFUSED:
        return False
    assert loaded.keys() == expected().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected().items())
    return True


def test_untouched_pieces_are_the_model(saved, tmp_path):
    assert same_or_refused(written(tmp_path, *pieces(saved)))


@given(data=st.data())
def test_a_lying_header_is_refused(saved, tmp_path_factory, data):
    manifest, header, body = pieces(saved)
    names = sorted(set(header) - {"__metadata__"})
    name = data.draw(st.sampled_from(names))
    entry = header[name]
    lie = data.draw(st.sampled_from(["shape", "offsets", "dtype", "missing", "surplus", "alias", "swap"]))
    if lie == "shape":
        entry["shape"][data.draw(st.integers(0, len(entry["shape"]) - 1))] = data.draw(
            st.sampled_from(HUGE + NOT_SIZES)
        )
    elif lie == "offsets":
        entry["data_offsets"][data.draw(st.integers(0, 1))] += data.draw(
            st.integers(-(2**63), 2**63).filter(lambda delta: delta != 0)
        )
    elif lie == "dtype":
        entry["dtype"] = data.draw(st.sampled_from(["F32", "I64", "U8", "F4", "F8_E4M3", "C64", "Q9", None, 3]))
    elif lie == "missing":
        del header[name]
    elif lie == "surplus":
        header["more"] = {"dtype": "F64", "shape": [0], "data_offsets": [len(body), len(body)]}
    elif lie == "alias":
        header["more"] = entry
    else:
        other = data.draw(st.sampled_from([other for other in names if header[other]["shape"] != entry["shape"]]))
        header[name], header[other] = header[other], header[name]
    path = written(tmp_path_factory.mktemp("lie"), manifest, header, body)
    assert not same_or_refused(path)


@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_header_with_any_byte_changed_is_refused_or_harmless(saved, tmp_path_factory, position, byte):
    manifest, header, body = pieces(saved)
    text = bytearray(json.dumps(header).encode())
    text[int(position * len(text))] = byte
    same_or_refused(written(tmp_path_factory.mktemp("byte"), manifest, bytes(text), body))


@pytest.mark.parametrize("length", [0, 1, 7, 10**6, 8 << 20, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_another_length_than_announced_is_refused(saved, tmp_path, length):
    assert not same_or_refused(written(tmp_path, *pieces(saved), length=length))


def test_a_name_given_twice_is_refused(saved, tmp_path):
    manifest, header, body = pieces(saved)
    text = json.dumps(header).encode()
    text = text[:-1] + b', "bos": ' + json.dumps(header["bos"]).encode() + b"}"
    with pytest.raises(ValueError, match=r"header of .*'bos' is given twice"):
        Evo.from_pretrained(written(tmp_path, manifest, text, body))


def test_a_header_longer_than_the_limit_is_refused(tmp_path, monkeypatch):
    save_file({f"tensor {i}": torch.zeros(1) for i in range(50)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(shards_module, "HEADER_LIMIT", 1000)
    with pytest.raises(ValueError, match="at most 1000 bytes"):
        Shards.open(tmp_path)


@given(entry=st.integers(0, 999), value=VALUES)
def test_a_hostile_config_is_refused(saved, tmp_path_factory, entry, value):
    manifest, header, body = pieces(saved)
    places = [manifest["config"], *(part for part in manifest["config"].values() if isinstance(part, dict))]
    names = [(place, name) for place in places for name in place]
    place, name = names[entry % len(names)]
    place[name] = value
    same_or_refused(written(tmp_path_factory.mktemp("config"), manifest, header, body))


@pytest.mark.parametrize(
    "entries",
    [
        {"depth": 2**31 - 1},
        {"depth": 10**9},
        {"width": 2**31 - 2, "heads": 1},
        {"vocab_size": 2**31 - 1},
        {"hidden": 2**31 - 1},
        {"latent_dim": 2**31 - 1, "vocab_size": 2**31 - 1},
        {"width": 2**30, "hidden": 2**31 - 1, "heads": 2**20, "vocab_size": 2**31 - 1},
        {"schedule": {"name": "learned", "intervals": 10**10}},
        {"schedule": {"name": "information_uniform", "radius": 1e300, "vocab_size": 2**40}},
        {"schedule": {"name": ["cosine"]}},
        {"schedule": {"name": {"name": "cosine"}}},
        {"schedule": {"name": "cosine", "t_min": "low"}},
        {"schedule": {"name": "shifted", "schedule": 3, "log_snr_shift": 1}},
        {"schedule": {}},
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_than_there_is_costs_nothing(saved, tmp_path, entries):
    manifest, header, body = pieces(saved)
    manifest["config"] |= entries
    assert not same_or_refused(written(tmp_path, manifest, header, body))


def test_a_long_context_costs_nothing(saved, tmp_path):
    manifest, header, body = pieces(saved)
    manifest["config"]["context"] = 2**31 - 1
    assert same_or_refused(written(tmp_path, manifest, header, body))


def test_weights_of_another_kind_of_number_are_refused(saved, tmp_path):
    manifest, header, body = pieces(saved)
    header["bos"]["dtype"] = "I64"
    with pytest.raises(ValueError, match=r"of other shapes \['bos \(8,\) torch.int64 instead of \(8,\) torch.float32"):
        Evo.from_pretrained(written(tmp_path, manifest, header, body))


def test_a_blueprint_is_the_state_of_the_model():
    for overrides in ({"depth": 3}, {"kv_heads": None, "schedule": {"name": "learned"}}):
        model = random_model(dtype=torch.float32, **overrides)
        found = {
            name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in blueprint(model.config).items()
        }
        assert found == {name: (tensor.shape, tensor.dtype, "meta") for name, tensor in model.state_dict().items()}


# Shards.


def sharded(path):
    """Two files, an index, and the tensors they hold."""
    tensors = {name: torch.randn(3, 4) for name in ("a", "b", "c")}
    parts = {"model-1.safetensors": ("a", "b"), "model-2.safetensors": ("c",)}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, path / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors, index["weight_map"]


def reindexed(path, names):
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return path


def test_shards_are_their_tensors(tmp_path):
    tensors, _ = sharded(tmp_path)
    found = Shards.open(tmp_path)
    assert dict(found.shapes) == dict.fromkeys("abc", (3, 4))
    assert dict(found.dtypes) == dict.fromkeys("abc", torch.float32)
    assert {name: file.name[6] for name, file in found.files.items()} == {"a": "1", "b": "1", "c": "2"}
    assert all(torch.equal(found.read(name), tensors[name]) for name in found)
    with pytest.raises(KeyError):
        found.read("d")
    save_file({"d": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(Shards.open(tmp_path)) == ["d"]
    assert set(Shards.open(tmp_path, "model.safetensors.index.json")) == set("abc")


def test_what_was_read_stays_when_the_file_changes(tmp_path):
    save_file({"a": torch.zeros(10)}, tmp_path / "model.safetensors")
    read = Shards.open(tmp_path).read("a")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.write(b"\1" * 40)
    assert torch.equal(read, torch.zeros(10))


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/passwd", "a/../b", "..", ".", "", "x\0y", "C:\\x", "y" * 300]
)
def test_paths_are_not_followed(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match=r"is not the plain name of a file"):
        Shards.open(reindexed(inside, {"a": name}))
    with pytest.raises(ValueError, match=r"is not the plain name of a file"):
        Shards.open(inside, name)


def test_a_link_that_leads_outside_is_refused_unless_allowed(tmp_path):
    inside = tmp_path / "snapshot"
    inside.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "blob")
    (inside / "model.safetensors").symlink_to("../blob")
    with pytest.raises(ValueError, match=r"is a link to .*blob, outside"):
        Shards.open(inside)
    assert list(Shards.open(inside, within=tmp_path)) == ["a"]


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").mkdir()
    for name in ("model.safetensors", "model.safetensors.index.json"):
        with pytest.raises(ValueError, match="not a regular file"):
            Shards.open(tmp_path, name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d": "model-1.safetensors"}, r"not in the files \['d'\]"),
        ({"b": None}, r"not in the index \['b'\]"),
        ({"a": "model-2.safetensors"}, "a in model-1.safetensors instead of model-2.safetensors"),
        ({"a": 3}, "no weight_map"),
        ({"a": ["model-1.safetensors"]}, "no weight_map"),
        ({"a": "model-3.safetensors"}, "model-3.safetensors is not there"),
        (dict.fromkeys("abc"), "no weight_map"),
    ],
)
def test_index_and_files_must_agree(tmp_path, change, said):
    _, names = sharded(tmp_path)
    changed = {name: file for name, file in {**names, **change}.items() if file is not None}
    with pytest.raises(REFUSED, match=said):
        Shards.open(reindexed(tmp_path, changed))


def test_a_tensor_in_two_files_is_refused(tmp_path):
    _, names = sharded(tmp_path)
    save_file({"c": torch.zeros(1), "a": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match="both hold a tensor 'a'"):
        Shards.open(reindexed(tmp_path, names))


def test_without_weights_it_is_said_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Shards.open(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"other\.safetensors is not there"):
        Shards.open(tmp_path, "other.safetensors")


# JSON.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[" * (DEPTH_LIMIT + 1) + b"]" * (DEPTH_LIMIT + 1), "nested deeper"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested deeper"),
        (b"NaN", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b"1e999", "too large"),
        (b"9" * 100_000, "does not fit 64 bits"),
        (b"-9223372036854775809", "does not fit 64 bits"),
        (b'{"a": 1, "a": 1}', "'a' is given twice"),
        (b'{"b": [{"a": 1, "c": 2, "a": 1}]}', "'a' is given twice"),
        (b"\xff", "not sound JSON"),
        (b"", "not sound JSON"),
        (b"{} {}", "not sound JSON"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_json_that_is_not_sound_is_refused(text, said):
    with pytest.raises(ValueError, match=f"it: .*{said}|it is .*{said}|it .*{said}"):
        parse_json(text, "it")


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text('a"\\é\n', max_size=4),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\é', max_size=4), inner, max_size=4),
        max_leaves=20,
    )
)
def test_sound_json_is_its_value(value):
    assert parse_json(json.dumps(value).encode(), "it") == value


@given(st.binary(max_size=40))
def test_any_bytes_are_json_or_a_value_error(data):
    try:
        value = parse_json(data, "it")
    except ValueError:
        return
    assert value == json.loads(data)


def test_long_json_is_refused(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[" + "1," * 50 + "1]")
    with pytest.raises(ValueError, match="has 103 bytes; at most 102 are read"):
        read_json(file, 102)
    assert read_json(file, 103) == [1] * 51
