"""Checkpoints that are not what they say, and models that cannot be written: each refused, with the reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from evo import Evo
from evo.core import LatentSpace, Transformer
from evo.interop import export_causal_lm, from_pretrained
from tests.conftest import full_disk, random_model
from tests.pretrained_models import reference, saved


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(reference("llama tied"), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return saved(reference("gpt2"), tmp_path_factory.mktemp("checkpoint"))


def edited(source: Path, target: Path, entries: dict) -> Path:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | entries
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_each_way_to_load_knows_the_other(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"is read by evo\.interop\.from_pretrained"):
        Evo.from_pretrained(checkpoint)
    random_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the config of an Evo: load that with Evo\.from_pretrained"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, r"'architectures' is \['MambaForCausalLM'\].*LlamaFor.*GPT2LMHead"),
        ({"architectures": None}, "'architectures' is None"),
        ({"hidden_act": "relu"}, "'hidden_act' is 'relu'.*'silu'"),
        ({"hidden_size": "wide"}, "'hidden_size' is 'wide'"),
        ({"hidden_size": -4}, "'hidden_size' is -4"),
        ({"hidden_size": 36, "head_dim": 9}, "head_dim is 9"),
        ({"head_dim": 2**31 - 2}, "head_dim is 2147483646"),
        ({"num_attention_heads": 2**31 - 1}, "'head_dim' is|head_dim"),
        ({"hidden_size": 64}, r"of other shapes .*\(32,\) torch.float32 instead of \(64,\)"),
        ({"num_attention_heads": 3}, "width 32, heads 3|heads must be a multiple|cannot be"),
        ({"num_hidden_layers": 3}, r"missing \['model.layers.2"),
        ({"num_hidden_layers": 1}, r"surplus \['model.layers.1"),
        ({"num_hidden_layers": 10**9}, "asks for 1000000000 blocks"),
        ({"vocab_size": 10**9}, "of other shapes"),
        ({"rms_norm_eps": 0}, "'rms_norm_eps' is 0"),
        ({"tie_word_embeddings": False}, "missing .*lm_head"),
        ({"attention_bias": True}, "missing .*self_attn.*bias"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "default, dynamic, linear, llama3 or yarn"),
        ({"rope_parameters": [1]}, "should be an object"),
        ({"layer_types": ["chunked_attention"]}, "'layer_types'"),
    ],
)
def test_a_config_that_its_weights_belie_is_refused(checkpoint, tmp_path, entries, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        from_pretrained(edited(checkpoint, tmp_path, entries))


@pytest.mark.parametrize(
    "entries",
    [
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"scale_attn_weights": False},
    ],
)
def test_options_that_are_not_computed_are_refused(gpt2, tmp_path, entries):
    (name,) = entries
    with pytest.raises(ValueError, match=f"'{name}' is .*what this library computes"):
        from_pretrained(edited(gpt2, tmp_path, entries))


def with_weights(source: Path, target: Path, change) -> Path:
    edited(source, target, {})
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("model.norm.weight"), r"missing \['model.norm.weight'\]"),
        (lambda state: state.update(extra=torch.zeros(1)), r"surplus \['extra'\]"),
        (lambda state: state.update({"lm_head.weight": torch.zeros(61, 32)}), "holds another head"),
        (lambda state: state.update({"model.norm.weight": torch.zeros(32, dtype=torch.int64)}), "no floating-point"),
        (lambda state: state["model.embed_tokens.weight"].fill_(torch.nan), "must be finite"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(checkpoint, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        from_pretrained(with_weights(checkpoint, tmp_path, change))


def test_what_is_no_weight_is_passed_over(checkpoint, gpt2, tmp_path):
    def more(state):
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    tokens = torch.arange(9).view(1, 9)
    expected = from_pretrained(checkpoint).context_logits(tokens)
    assert torch.equal(from_pretrained(with_weights(checkpoint, tmp_path, more)).context_logits(tokens), expected)
    (tmp_path / "gpt2").mkdir()
    masked = with_weights(
        gpt2, tmp_path / "gpt2", lambda state: state.update({"transformer.h.0.attn.bias": torch.ones(1, 1)})
    )
    assert torch.equal(from_pretrained(masked).context_logits(tokens), from_pretrained(gpt2).context_logits(tokens))


def test_a_context_is_no_longer_than_is_exact(checkpoint, tmp_path):
    assert from_pretrained(checkpoint, context=10).context == 10
    with pytest.raises(ValueError, match="context is 49; this model is exact for 1 to 48"):
        from_pretrained(checkpoint, context=49)
    with pytest.raises(ValueError, match=r"dtype is torch.int8; weights are floating-point numbers"):
        from_pretrained(checkpoint, dtype=torch.int8)
    sliding = saved(reference("mistral"), tmp_path)
    assert from_pretrained(sliding).context == 20
    with pytest.raises(ValueError, match="exact for 1 to 20"):
        from_pretrained(sliding, context=21)


def test_a_window_that_is_not_spoken_of_is_the_one_of_the_reference(tmp_path):
    for kind, entries in (("mistral", {}), ("qwen2", {"use_sliding_window": True})):
        (tmp_path / kind).mkdir()
        path = edited(
            saved(reference(kind), tmp_path / f"of {kind}"),
            tmp_path / kind,
            {"max_position_embeddings": 9000, **entries},
        )
        config = json.loads((path / "config.json").read_text())
        for said, context in (({}, 4096), ({"sliding_window": None}, 9000), ({"sliding_window": 300}, 300)):
            config.pop("sliding_window", None)
            (path / "config.json").write_text(json.dumps(config | said))
            theirs = AutoConfig.from_pretrained(path).sliding_window
            assert from_pretrained(path).context == context == (theirs or 9000)


def test_where_there_is_no_model(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory, and not the id"):
        from_pretrained(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'evo-lm\[hf\]'"):
        from_pretrained("somebody/something")


def test_the_other_package_is_not_needed(checkpoint):
    code = f"import sys; from evo.interop import from_pretrained as f; f({str(checkpoint)!r}); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_model_that_no_family_computes_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="readout_bias=False"):
        export_causal_lm(random_model(), tmp_path / "out")
    with pytest.raises(ValueError, match="no family computes"):
        export_causal_lm(random_model(rotary=None), tmp_path / "out")
    by_hand = Evo(latent_space=LatentSpace(7, 8), backbone=Transformer(8, 32, 1, 2, positions=20))
    with pytest.raises(ValueError, match="composed by hand"):
        export_causal_lm(by_hand, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_written(checkpoint, tmp_path):
    model = from_pretrained(checkpoint)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("somebody's")
    with pytest.raises(FileExistsError, match="is there already"):
        export_causal_lm(model, tmp_path / "there")

    with full_disk(), pytest.raises(OSError, match="could not be written"):
        export_causal_lm(model, tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]
    export_causal_lm(model, tmp_path / "new")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
