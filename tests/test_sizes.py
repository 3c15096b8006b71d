"""The arithmetic of sizes against what is measured on small models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evo import EvoConfig, Objective
from evo.cli import main
from evo.core import PRESETS, Cache, Exploration
from evo.core.config import preset
from evo.training import OptimizerConfig
from evo.training.budget import budget
from evo.training.flops import Flops
from evo.training.memory import AUTOCAST, FP32, Parameters, StateBytes, activation_bytes, cache_bytes_per_token
from evo.training.optimizer import Ema, adamw


def small(**overrides) -> EvoConfig:
    size = {
        "vocab_size": 101,
        "width": 64,
        "depth": 2,
        "heads": 4,
        "kv_heads": 2,
        "latent_dim": 24,
        "hidden": 160,
        "context": 64,
        "dropout": 0.0,
    }
    return EvoConfig.from_json({**size, **overrides})


configs = st.builds(
    small,
    depth=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
    hidden=st.sampled_from([96, 160]),
    latent_dim=st.sampled_from([8, 24]),
    self_conditioning=st.booleans(),
    feed_forward=st.sampled_from([{"name": "SwiGLU"}, {"name": "GELU"}]),
    bos=st.sampled_from(["attended", "detached"]),
)


# Parameters.


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_model(name):
    config = preset(name, vocab_size=2**16)
    with torch.device("meta"):
        model = config.build()
    found = Parameters.of(config)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.backbone == sum(p.numel() for p in model.backbone.parameters())
    assert found.heads == sum(p.numel() for part in (model.readout, model.timestep_head) for p in part.parameters())


@given(config=configs)
def test_parameters_of_any_config_are_those_of_the_model(config):
    assert Parameters.of(config).total == sum(p.numel() for p in config.build().parameters())


def test_state_is_what_a_step_leaves():
    config = small()
    model = config.build()
    optimizer, ema = adamw(model, OptimizerConfig()), Ema(model, 0.99)
    model(torch.randint(0, 101, (4, 16)), objective=Objective(exploration=Exploration(share=0.5))).loss.backward()
    optimizer.step()
    found = StateBytes.of(Parameters.of(config).total)
    assert found.weights == _bytes(model.parameters())
    assert found.gradients == _bytes(p.grad for p in model.parameters() if p.grad is not None) + _bytes(
        p for p in model.parameters() if p.grad is None
    )
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    untouched = [p for p in model.parameters() if p.grad is None]
    assert found.moments == _bytes(moments) + 2 * _bytes(untouched)
    assert found.average == _bytes(ema.model.parameters())
    assert found.total == found.weights + found.gradients + found.moments + found.average


def _bytes(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@given(config=configs, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_cached_bytes_are_those_of_the_cache(config, dtype):
    model = config.build().to(dtype)
    cache, count = Cache(8), 8
    with torch.no_grad():
        latents = torch.randn(3, count, config.latent_dim, dtype=dtype)
        model.backbone(latents, torch.zeros(3, count), cache=cache, store=True)
    allocated = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for pair in cache._layers for x in pair}
    assert sum(allocated.values()) == 3 * count * cache_bytes_per_token(config, dtype.itemsize)


# Operations.


@pytest.fixture
def counted():
    """Attention as plain products, which the counter sees on every device."""

    def count(run):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    return count


@given(config=configs, length=st.integers(2, 9))
def test_flops_of_sketching(counted, config, length):
    model, flops = config.build().eval(), Flops.of(config)

    @torch.no_grad()
    def sketch():
        latents = torch.randn(2, length, config.latent_dim)
        hidden = model.sketch(latents, torch.rand(2, length))
        model.timestep_head(hidden, model.readout(hidden, model.latent_space.weight))

    passed = length - 1 + flops.bos
    expected = passed * flops.sketch(passed) + (length - passed) * (flops.readout + flops.head)
    assert counted(sketch) == 2 * expected


@given(config=configs, length=st.integers(1, 9), past=st.integers(1, 9))
def test_flops_of_a_refinement_step_behind_a_cached_prompt(counted, config, length, past):
    model, flops = config.build().eval(), Flops.of(config)
    prompt = torch.randint(0, 101, (2, past))
    field = model.vector_field(prompt)
    latents, level = torch.randn(2, length, config.latent_dim), torch.full((2, length), 0.5)
    estimate = latents if config.self_conditioning else None
    with torch.no_grad():
        found = counted(lambda: field.denoise(latents, level, estimate))
    assert found == 2 * length * flops.refine(past + flops.bos + length)


@given(
    config=configs,
    length=st.integers(2, 9),
    sequences=st.integers(1, 5),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    causal_weight=st.sampled_from([0.0, 1.0]),
    self_conditioning=st.sampled_from([0.0, 0.5, 1.0]),
    trials=st.sampled_from([0.0, 1.0]),
)
def test_flops_of_a_training_step(counted, config, length, sequences, share, causal_weight, self_conditioning, trials):
    model, flops = config.build().train(), Flops.of(config, attention_backward=2)
    objective = Objective(
        exploration=Exploration(share=share),
        causal_weight=causal_weight,
        self_conditioning=self_conditioning,
        trials=trials,
    )
    tokens = torch.randint(0, 101, (sequences, length))
    found = counted(lambda: model(tokens, objective=objective).loss.backward())
    assert found == flops.training(objective, sequences=sequences, length=length)


# Activations.


def kept(config, length, precision, sequences=2, causal_weight=0.0) -> int:
    """Bytes that autograd keeps of a training step at random levels, by storage, weights and their casts left out."""
    model = config.build().train()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    shapes = {parameter.shape for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        cast = tensor.dtype == torch.bfloat16 and tensor.dim() == 2 and {tensor.shape, tensor.T.shape} & shapes
        if storage._cdata not in weights and not cast:
            storages.setdefault(storage._cdata, storage)
        return tensor

    tokens = torch.randint(0, config.vocab_size, (sequences, length))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision.casts),
    ):
        model(tokens, objective=Objective(exploration=Exploration(share=1.0), causal_weight=causal_weight))
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("precision", "overrides"),
    [
        (FP32, {}),
        (FP32, {"kv_heads": 4}),
        (FP32, {"feed_forward": {"name": "GELU"}, "norm": {"name": "LayerNorm"}}),
        (FP32, {"qk_norm": True}),
        (AUTOCAST, {}),
        (AUTOCAST, {"qk_norm": True}),
        (AUTOCAST, {"qk_norm": True, "norm": {"name": "LayerNorm"}}),
        (AUTOCAST, {"feed_forward": {"name": "GELU"}, "norm": {"name": "LayerNorm"}}),
    ],
    ids=str,
)
@pytest.mark.parametrize("scored_first", [False, True])
def test_activations_are_what_autograd_keeps(precision, overrides, scored_first):
    length, weight = 60, 10.0 if scored_first else 0.0
    how = {"precision": precision, "fused": False, "mask_matrices": True, "scored_first": scored_first}

    def both(**more):
        """Measured and expected for a sequence; as the growth with the batch, so that what all sequences share falls out."""
        config = small(**overrides, **more)
        measured = kept(config, length, precision, 3, weight) - kept(config, length, precision, 2, weight)
        return measured, activation_bytes(config, length=length, **how)

    measured, found = both()
    assert measured == pytest.approx(found.total - found.workspace, rel=0.02)
    deeper, expected = both(depth=5)
    assert deeper - measured == pytest.approx(expected.blocks + expected.masks - found.blocks - found.masks, rel=0.01)
    wider, expected = both(vocab_size=404)
    assert wider - measured == pytest.approx(expected.logits - found.logits, rel=0.01)


# A run on paper.


def planned(config=None, **more):
    asked = {"gpus": 8, "gpu_bytes": 1e8, "peak_flops": 1e12, "utilisation": 0.5}
    return budget(small() if config is None else config, **{**asked, **more})


def test_as_many_sequences_as_fit():
    found = planned()
    assert found.micro_batch >= 1
    assert found.used_bytes <= found.gpu_bytes < found.used_bytes + found.activations.total
    with pytest.raises(
        ValueError, match=rf"{found.micro_batch + 1} sequence\(s\) of 64 tokens need .* GiB on each GPU"
    ):
        planned(micro_batch=found.micro_batch + 1)
    assert planned(checkpointing=False).micro_batch < found.micro_batch
    assert planned(precision=FP32).micro_batch < found.micro_batch
    assert planned(length=32).micro_batch > 1.9 * found.micro_batch
    assert planned(objective=Objective(causal_weight=1.0)).micro_batch < found.micro_batch


def test_time_is_work_over_speed():
    found = planned(micro_batch=4, accumulate=3, checkpointing=False)
    assert found.tokens_per_step == 8 * 3 * 4 * 64
    work = 3 * found.flops.training(Objective(), sequences=4, length=64)
    assert found.seconds_per_step == pytest.approx(work / 0.5e12)
    assert found.training_flops == pytest.approx(work / (3 * 4 * 64))
    assert found.days(found.tokens_per_step * 10) == pytest.approx(10 * found.seconds_per_step / 86400)
    redone = planned(micro_batch=4, accumulate=3)
    forward = found.flops.blocks + found.flops.per_key * 64.5
    assert redone.training_flops - found.training_flops == pytest.approx(2 * forward, rel=0.02)


def test_state_is_shared_by_all_gpus():
    one, many = planned(gpus=1, precision=FP32), planned(gpus=16)
    assert one.gathered_bytes == 0
    assert planned(gpus=1).gathered_bytes == many.gathered_bytes > 0
    assert one.fixed_bytes - one.vocabulary_bytes == one.state.total == 20 * one.parameters.total
    assert many.fixed_bytes - many.vocabulary_bytes - many.gathered_bytes == one.state.total / 16
    casts = planned(gpus=1, precision=AUTOCAST, checkpointing=False).gathered_bytes
    assert casts == 2 * small().depth * one.parameters.block


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpus": 0},
        {"accumulate": 0},
        {"length": 65},
        {"length": 0},
        {"micro_batch": 0},
        {"utilisation": 0.0},
        {"utilisation": 1.1},
        {"gpu_bytes": 0.0},
        {"gpu_bytes": 1e5},
        {"peak_flops": -1.0},
    ],
    ids=str,
)
def test_what_is_no_run_is_refused(wrong):
    with pytest.raises(ValueError, match=r"needed|need "):
        planned(**wrong)


def test_info_plans_a_run(capsys):
    asked = ["info", "--preset", "XL", "--gpus", "256", "--gpu-memory", "80"]
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = preset("XL", vocab_size=2**16)
    assert found["parameters"]["total"] == Parameters.of(config).total
    assert found["cache_bytes_per_token"] == cache_bytes_per_token(config) == 2 * 41 * 4096 * 2
    assert found["flops_per_token"]["sketch"] == Flops.of(config).sketch(4096)
    memory = found["memory_bytes_per_gpu"]
    assert sum(size for name, size in memory.items() if name != "total") == pytest.approx(memory["total"])
    assert f"{found['tokens_per_step']:,}" in shown
    assert f"{found['days']:.1f}  days" in shown
    assert main([*asked, "--gpus", "2"]) == 2
    assert "GiB on each GPU" in capsys.readouterr().err
    assert main(["info", "--preset", "XXL"]) == 2
    assert "unknown preset 'XXL'; known are tiny" in capsys.readouterr().err


def test_the_document_shows_what_the_command_prints(capsys):
    page = (Path(__file__).parent.parent / "docs" / "sizes.md").read_text(encoding="utf-8")
    command, shown = re.search(r"```sh\n\S+evo (info .*?)\n```\n\n```text\n(.*?)```", page, re.DOTALL).groups()
    assert main(command.split()) == 0
    assert capsys.readouterr().out == shown
    for name in PRESETS:
        count = Parameters.of(preset(name, vocab_size=2**16)).total
        said, unit = re.search(rf"^\| `{name}` .*\| ([\d.]+) ([MB]) \|$", page, re.MULTILINE).groups()
        assert float(said) == pytest.approx(count / {"M": 1e6, "B": 1e9}[unit], rel=0.005)


def test_info_is_json_too(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["presets"]) == set(PRESETS)
    assert found["presets"]["S"]["parameters"] == Parameters.of(preset("S", vocab_size=2**16)).total


def test_help_does_not_wait_for_torch():
    code = """
import sys
from evo.cli import main
main(["--help"])
try:
    main(["info", "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--gpu-memory" in done.stdout
