"""A model on disk (R-1): the same model, or an error."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evo import Evo, EvoConfig
from evo.core import LatentSpace, Transformer
from evo.core.serialization import _json_sha256
from evo.files import sha256
from evo.schedules import Cosine, Shifted
from tests.conftest import full_disk, generator, random_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    random_model().save_pretrained(path)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def weights_of(path):
    (file,) = path.glob("*.safetensors")
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_r_1_a_saved_model_says_the_same(tmp_path, dtype):
    model = random_model(dtype=dtype)
    tokens = torch.randint(0, 7, (2, 9), generator=generator())
    model.save_pretrained(tmp_path)
    loaded = Evo.from_pretrained(tmp_path)
    assert torch.equal(loaded.context_logits(tokens), model.context_logits(tokens))
    assert not loaded.training
    assert loaded.config == model.config
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_every_part_of_the_state_travels(saved):
    state = random_model().state_dict()
    loaded = Evo.from_pretrained(saved).state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)


def test_a_schedule_travels_with_its_options(tmp_path):
    schedule = Shifted(Cosine(t_min=0.2), 1.5)
    model = random_model(schedule=schedule.config())
    model.save_pretrained(tmp_path)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    assert torch.equal(Evo.from_pretrained(tmp_path).schedule.log_snr(t), schedule.log_snr(t))
    assert Evo.from_pretrained(tmp_path).schedule.t_min == schedule.t_min


def test_every_weight_keeps_its_own_precision_and_random_numbers_stay_where_they_are(tmp_path):
    model = random_model(dtype=torch.float32)
    model.backbone.bfloat16()
    model.save_pretrained(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"somebody else's")
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = Evo.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert (tmp_path / "model-00001-of-00002.safetensors").exists()


def test_saving_again_replaces_the_model(tmp_path):
    random_model(0).save_pretrained(tmp_path)
    second = random_model(1)
    second.save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(Evo.from_pretrained(tmp_path).bos, second.bos)


@pytest.mark.parametrize("moment", [0, 1])
def test_a_save_that_is_cut_short_leaves_the_old_model(tmp_path, monkeypatch, moment):
    first = random_model(0)
    first.save_pretrained(tmp_path)
    replacements = []

    def replace(source, target):
        if len(replacements) == moment:
            raise KeyboardInterrupt
        replacements.append(target)
        source.rename(target)

    monkeypatch.setattr("evo.core.serialization.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        random_model(1).save_pretrained(tmp_path)
    assert torch.equal(Evo.from_pretrained(tmp_path).bos, first.bos)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_old_model(tmp_path):
    first = random_model(0)
    first.save_pretrained(tmp_path)
    with full_disk(), pytest.raises(OSError, match="could not be written"):
        random_model(1).save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(Evo.from_pretrained(tmp_path).bos, first.bos)


@settings(max_examples=40)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.sampled_from(["weights", "config"]))
def test_r_1_one_altered_bit_is_an_error_or_harmless(saved, tmp_path_factory, position, bit, which):
    path = tmp_path_factory.mktemp("altered")
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    target = weights_of(path) if which == "weights" else path / "config.json"
    data = bytearray(target.read_bytes())
    data[int(position * len(data))] ^= 1 << bit
    target.write_bytes(data)
    expected = random_model().state_dict()
    try:
        loaded = Evo.from_pretrained(path)
    except ValueError:
        return
    # White space, or the version that wrote it: the model is the one that was saved.
    assert which == "config"
    assert loaded.config == random_model().config
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@settings(max_examples=20)
@given(share=st.floats(0, 1, exclude_max=True))
def test_r_1_a_truncated_file_is_an_error(saved, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut")
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    data = weights_of(path).read_bytes()
    weights_of(path).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="damaged or was altered"):
        Evo.from_pretrained(path)


def test_there_is_no_model_where_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="save one there with"):
        Evo.from_pretrained(tmp_path)


def edited(path, **entries):
    file = path / "config.json"
    data = json.loads(file.read_text())
    for name, value in entries.items():
        (data if name in data else data["config"])[name] = value
    data["config_sha256"] = _json_sha256(data["config"])
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"width": 64}, "weights of another model"),
        ({"depth": 3}, "missing .*blocks.2"),
        ({"width": "wide"}, "'width' is 'wide'"),
        ({"width": -4}, "'width' is -4"),
        ({"width": True}, "'width' is True"),
        ({"context": 10**12}, "'context' is 1000000000000"),
        ({"config": {"width": 4}}, "needs .*vocab_size"),
        ({"config": {"vocab_size": 4, "wide": 4}}, "unknown entries .*wide"),
        ({"weights": "../model.safetensors"}, "a file beside it"),
        ({"sha256": 3}, "sha256=3"),
        ({"format": 99}, "format 1"),
        ({"schedule": {"name": "nonesuch"}}, "nonesuch"),
    ],
)
def test_a_config_that_is_wrong_is_an_error(copy, entries, said):
    edited(copy, **entries)
    with pytest.raises(ValueError, match=said):
        Evo.from_pretrained(copy)


def test_weights_that_are_not_there_are_an_error(copy):
    weights_of(copy).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-\w+\.safetensors is not there: copy the directory whole"):
        Evo.from_pretrained(copy)


def test_a_config_edited_by_hand_is_an_error(copy):
    file = copy / "config.json"
    file.write_text(file.read_text().replace('"base": 10000.0', '"base": 10001.0'))
    with pytest.raises(ValueError, match=r"was altered.*load_state_dict"):
        Evo.from_pretrained(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_config_that_is_not_one_is_an_error(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        Evo.from_pretrained(copy)


def test_weights_of_another_shape_are_an_error_even_if_vouched_for(copy):
    state = load_file(weights_of(copy))
    state["bos"] = torch.zeros(3, dtype=torch.float64)
    state["surplus"] = torch.zeros(1)
    save_file(state, weights_of(copy))
    edited(copy, sha256=sha256(weights_of(copy)))
    with pytest.raises(ValueError, match=r"surplus \['surplus'\].*bos \(3,\) torch.float64 instead of \(8,\)"):
        Evo.from_pretrained(copy)


def test_a_model_composed_by_hand_is_loaded_into_one_composed_alike(tmp_path):
    def compose():
        return Evo(latent_space=LatentSpace(7, 8), backbone=Transformer(8, 32, 1, 2, positions=20))

    model, other = compose(), compose()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="composed by hand"):
        Evo.from_pretrained(tmp_path)
    assert not torch.equal(model.bos, other.bos)
    assert torch.equal(other.load_weights(tmp_path).bos, model.bos)


def test_configs_are_their_json():
    config = EvoConfig(vocab_size=7, width=32, depth=1, heads=2, schedule=Cosine().config())
    assert EvoConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown preset 'huge'; known are tiny, small, S, B, L, XL, H"):
        Evo.from_preset("huge", vocab_size=7)
    with pytest.raises(ValueError, match="unknown entries"):
        Evo.from_preset("tiny", vocab_size=7, widht=32)
