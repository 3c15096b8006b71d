"""Without a BOS: what the first token is told, and that nothing else depends on there being one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.core.bound import learned_levels
from evo.core.contract import as_batch
from evo.core.layers import GELU, LayerNorm
from evo.core.prompted import Prompted
from evo.heads import FixedTimestep
from evo.testing import check_model_limits
from tests.conftest import generator, random_model

GPT2_LIKE = {"rotary": None, "norm": LayerNorm(), "feed_forward": GELU(), "qkv_bias": True, "out_bias": True}
MODELS = {
    "rotary": random_model(bos="detached"),
    "learned positions": random_model(bos="detached", **GPT2_LIKE),
    "normalised heads": random_model(bos="detached", qk_norm=True, head_dim=6),
}
EVERY_MODEL = pytest.mark.parametrize("name", list(MODELS))
V, D = 7, 8


def tokens_of(seed: int, batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=generator(seed))


@EVERY_MODEL
def test_the_limits_hold(name):
    check_model_limits(MODELS[name])


def test_the_limits_hold_of_every_kind_of_layer_behind_an_attended_bos():
    check_model_limits(random_model(**GPT2_LIKE))
    check_model_limits(random_model(qk_norm=True, head_dim=6))


@EVERY_MODEL
def test_nothing_is_known_of_the_first_token_and_its_position_is_zero(name):
    model, tokens = MODELS[name], tokens_of(0)
    logits = model.context_logits(tokens)
    # The readout of these models has a bias, which is all there is in row 0.
    assert torch.equal(logits[:, 0], model.readout.bias.expand(3, -1))
    latents = model.latent_space.weight[tokens]
    alone = model.backbone(latents, torch.zeros(tokens.shape, dtype=torch.float64))
    torch.testing.assert_close(model.readout(alone, model.latent_space.weight)[:, :-1], logits[:, 1:])
    assert model.context == 40
    assert model.context_logits(tokens_of(0, length=40)).shape == (3, 40, V)
    assert model.context_logits(tokens_of(0, length=1)).shape == (3, 1, V)


@EVERY_MODEL
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 5), min_size=3, max_size=3), windows=st.booleans())
def test_prompts_of_different_lengths_are_written_on_as_if_alone(name, seed, lengths, windows):
    model, prompt, size = MODELS[name], tokens_of(seed, length=5), torch.tensor(lengths)
    options = {"timestep_head": FixedTimestep(0.0), "temperature": 0.0, "window": 3 if windows else None}
    together = model.generate(prompt, 6, lengths=size, **options).tokens
    for row, length in enumerate(lengths):
        alone = model.generate(prompt[row : row + 1, :length], 6, **options).tokens
        assert torch.equal(together[row : row + 1], alone)


@EVERY_MODEL
@pytest.mark.parametrize("window", [None, 3])
def test_it_refines_in_windows_from_an_empty_prompt_too(name, window):
    model = MODELS[name]
    for length in (0, 4):
        out = model.generate(tokens_of(0)[:, :length], 8, window=window, max_steps=4, generator=generator())
        assert out.tokens.shape == (3, 8)
        assert out.nfe > 0


@EVERY_MODEL
@given(seed=st.integers(0, 10**6))
def test_learned_levels_found_in_parallel_are_those_of_the_sequential_sketch(name, seed):
    model, tokens = MODELS[name], tokens_of(seed)
    noise = torch.randn(*tokens.shape, D, generator=generator(seed), dtype=torch.float64)
    with torch.no_grad():
        parallel = learned_levels(model, as_batch(model, tokens), noise)
        state, levels = Prompted(model, tokens[:, :0], None, tokens.shape[1]), []
        for index in range(tokens.shape[1]):
            level = model.timestep_head(state.hidden, state.speak().unsqueeze(1))[:, 0]
            level = torch.where(level > model.schedule.t_min, level, 0.0)
            clean = state.denoiser.embeddings[tokens[:, index]]
            latent = torch.where(level[:, None] > 0, model.schedule.noised(clean, noise[:, index], level), clean)
            state.read(latent[:, None], level[:, None])
            levels.append(level)
    torch.testing.assert_close(parallel, torch.stack(levels, 1), rtol=0, atol=1e-9)
    assert parallel.std() > 0.01, "levels that are all alike would make this test empty"


def test_what_the_first_token_is_told_is_learned():
    model = random_model(bos="detached").train()
    model(tokens_of(0), generator=generator()).loss.backward()
    assert model.bos.grad.any()
