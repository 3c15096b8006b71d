"""Rotary frequencies against those of the transformers package, and what a table of them promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from evo.core.rotary import LinearScaling, Llama3Scaling, Rotary, RotaryTable, YarnScaling
from evo.interop.entries import Entries
from evo.interop.rope import read_rotary, write_rotary

FACTORS = st.floats(1.1, 40)
ORIGINALS = st.integers(64, 16_384)
SCALINGS = st.one_of(
    st.none(),
    st.builds(LinearScaling, factor=FACTORS),
    st.builds(
        Llama3Scaling,
        factor=FACTORS,
        low_frequency=st.floats(0.5, 2),
        high_frequency=st.floats(3, 8),
        original_context=ORIGINALS,
    ),
    st.builds(
        YarnScaling,
        factor=FACTORS,
        original_context=ORIGINALS,
        fast=st.floats(16, 64),
        slow=st.floats(0.5, 4),
        amplitude=st.floats(0.5, 2),
        whole=st.booleans(),
    ),
)
ROTARIES = st.builds(Rotary, base=st.floats(100, 1e6), scaling=SCALINGS)


def theirs(rope: dict, head_dim: int) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=32_768, rope_parameters=rope
    )
    return LlamaRotaryEmbedding(config)


@given(rotary=ROTARIES, head_dim=st.sampled_from([8, 64, 128]))
def test_frequencies_are_those_of_the_reference(rotary, head_dim):
    reference = theirs(write_rotary(rotary), head_dim)
    found = rotary.frequencies(head_dim)
    torch.testing.assert_close(found.float(), reference.inv_freq, rtol=1e-4, atol=1e-9)
    amplitude = 1.0 if rotary.scaling is None else rotary.scaling.amplitude
    assert amplitude == pytest.approx(reference.attention_scaling)


@given(rotary=ROTARIES)
def test_a_description_is_read_back_as_it_was_written(rotary):
    assert (
        read_rotary(Entries({"rope_parameters": write_rotary(rotary), "max_position_embeddings": 8}, "here")) == rotary
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"mscale": 1.3, "mscale_all_dim": 0.7}, {"attention_factor": 1.7}, {"beta_fast": 20, "beta_slow": 3}],
)
def test_what_a_yarn_config_leaves_out_follows_from_the_rest(options):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 512, **options}
    rotary = read_rotary(Entries({"rope_parameters": rope, "max_position_embeddings": 4096}, "here"))
    reference = theirs(rope, 64)
    torch.testing.assert_close(rotary.frequencies(64).float(), reference.inv_freq, rtol=1e-4, atol=1e-9)
    assert rotary.scaling is not None
    assert rotary.scaling.amplitude == pytest.approx(reference.attention_scaling)


def test_a_table_goes_where_the_weights_go_and_keeps_its_precision():
    table = RotaryTable(Rotary(), 8)
    expected = table.frequencies.clone()
    for moved in (table.bfloat16(), table.double(), table.to_empty(device="cpu")):
        assert moved.frequencies.dtype == torch.float32
        assert torch.equal(moved.frequencies, expected)
    with torch.device("meta"):
        assert torch.equal(RotaryTable(Rotary(), 8).frequencies, expected)
    assert not table.state_dict()


def test_positions_are_turned_by_their_angle():
    table = RotaryTable(Rotary(base=100.0), 4)
    cos, sin = table(torch.tensor([[0, 3]]), torch.float64, torch.float64)
    angles = torch.tensor([[0.0, 0.0], [3.0, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(cos[0, 0], angles.cos().repeat(1, 2), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[0, 0], torch.cat([-angles.sin(), angles.sin()], -1), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Rotary(base=1.0), "base is 1.0"),
        (lambda: LinearScaling(factor=0.0), "factor is 0.0"),
        (
            lambda: Llama3Scaling(factor=2.0, low_frequency=4.0, high_frequency=4.0, original_context=8),
            "low_frequency 4.0 must lie below",
        ),
        (lambda: RotaryTable(Rotary(), 7), "head_dim is 7"),
        (lambda: read_rotary(Entries({"rope_scaling": {"type": "longrope"}}, "here")), "default, dynamic, linear"),
        (lambda: read_rotary(Entries({"partial_rotary_factor": 0.5}, "here")), "partial_rotary_factor"),
        (lambda: read_rotary(Entries({"rope_parameters": {"rope_type": "linear"}}, "here")), "'factor' is None"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
