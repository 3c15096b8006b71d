"""A pretrained vocabulary as a latent space: exact, and told apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo import EvoConfig
from evo.core.pretrained import PretrainedVocabulary
from tests.conftest import generator

CONFIG = {"vocab_size": 300, "width": 16, "depth": 1, "heads": 2, "context": 8}


def embeddings_of(seed: int, spread: float, mean: float, dtype: torch.dtype) -> torch.Tensor:
    """With lengths that differ by a factor of thirty, a mean, and two twins."""
    draws = generator(seed)
    table = torch.randn(300, 16, generator=draws) * torch.logspace(-1, 0.5, 300)[:, None] * spread
    table[7] = table[8]
    return (table + mean * spread * torch.randn(16, generator=draws)).to(dtype)


@given(
    seed=st.integers(0, 10**6),
    spread=st.floats(1e-3, 1e3),
    mean=st.sampled_from([0.0, 1.0, 5.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_embeddings_come_back_bit_for_bit_and_their_distances_are_those_of_the_sphere(seed, spread, mean, dtype):
    # What a scale below 1 makes too small for float16 to hold is not held.
    spread = min(spread, 0.03) if dtype == torch.float16 else spread
    embeddings = embeddings_of(seed, spread, mean, dtype)
    vocabulary = PretrainedVocabulary.of(embeddings, tied=True, slack=64)
    lifted = vocabulary.lift(embeddings)
    assert lifted.dtype == dtype
    assert torch.equal(vocabulary.embed(16).to(dtype)(lifted), embeddings)
    distances = torch.cdist(lifted.double(), lifted.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    # Over all ordered pairs, each entry with itself among them, twice the total variance: 4 ln V.
    torch.testing.assert_close(distances.mean(), torch.tensor(4 * math.log(300)).double(), rtol=0.02, atol=0)
    others = distances + torch.eye(300) * 1e9
    assert others.min() > 0.25 * 4 * math.log(300) / 2


@given(seed=st.integers(0, 10**6))
def test_directions_do_not_depend_on_the_seed_of_the_process_nor_move_it(seed):
    embeddings = embeddings_of(0, 1.0, 0.0, torch.float32)
    vocabulary = PretrainedVocabulary.of(embeddings, tied=True)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    lifted = vocabulary.lift(embeddings)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(lifted, vocabulary.lift(embeddings))


def test_a_fresh_model_can_be_built_of_such_a_config():
    pretrained = PretrainedVocabulary(scale=0.5, slack=8, tied=False)
    config = EvoConfig(**CONFIG, pretrained=pretrained, bos="detached")
    assert EvoConfig.from_json(config.to_json()) == config
    model = config.build()
    tokens = torch.randint(300, (2, 8), generator=generator())
    model(tokens, generator=generator()).loss.backward()
    assert model.latent_space.table.grad.any()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PretrainedVocabulary(scale=0.3, slack=8, tied=True), "a power of two"),
        (lambda: PretrainedVocabulary(scale=0.5, slack=0, tied=True), "slack is 0"),
        (lambda: PretrainedVocabulary.of(torch.ones(9, 4), tied=True), "not all alike"),
        (lambda: PretrainedVocabulary.of(torch.full((9, 4), torch.nan), tied=True), "must be finite"),
        (
            lambda: EvoConfig(**CONFIG, latent_dim=4, pretrained=PretrainedVocabulary(scale=1, slack=8, tied=True)),
            "unset",
        ),
        (
            lambda: EvoConfig.from_json({**CONFIG, "norm": {"name": "BatchNorm"}}),
            "'BatchNorm'; known are RMSNorm, Layer",
        ),
        (lambda: EvoConfig.from_json({**CONFIG, "norm": {"name": "RMSNorm", "eps": "0"}}), "'eps' is '0'"),
        (lambda: EvoConfig.from_json({**CONFIG, "norm": {"name": "RMSNorm", "eps": -1.0}}), "eps is -1.0"),
        (lambda: EvoConfig(**CONFIG, bos="sometimes").build(), "'sometimes'; known are attended, detached"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
