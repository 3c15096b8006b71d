"""The autoregressive and the diffusion limit (AR-1 to AR-3, D-1, D-2), and learned levels (L-1)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from evo.core.bound import learned_levels
from evo.core.contract import as_batch, as_part
from evo.core.draws import Draws
from evo.core.evaluation import measure
from evo.core.prompted import Prompted
from evo.heads import FixedTimestep
from evo.schedules import by_order, early_stop, full, late_start
from evo.solvers import Euler, Exponential
from tests.conftest import Given, generator, random_model

MODEL = random_model()
V, D = MODEL.latent_space.vocab_size, MODEL.latent_space.dim
PATHS = [early_stop, late_start, full, by_order(torch.linspace(0, 1, 9), 0.5)]


def tokens_of(seed: int, batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(0, V, (batch, length), generator=generator(seed))


@given(seed=st.integers(0, 10**6), path=st.sampled_from(PATHS))
def test_ar_1_the_bound_at_level_zero_is_the_causal_nll(seed, path):
    tokens = tokens_of(seed)
    out = MODEL(tokens, levels=0.0, path=path, generator=generator(seed))
    causal = F.cross_entropy(MODEL.context_logits(tokens).transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(out.bound, causal, rtol=0, atol=1e-10)
    assert (out.flow_bits == 0).all()
    assert (out.reconstruction == 0).all()
    torch.testing.assert_close(-MODEL.log_prob(tokens), causal, rtol=0, atol=1e-10)


@given(seed=st.integers(0, 10**6))
def test_ar_1_holds_in_training_mode(seed):
    model = random_model()
    model.train()
    tokens = tokens_of(seed)
    out = model(tokens, levels=0.0, generator=generator(seed))
    causal = F.cross_entropy(model.context_logits(tokens).transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(out.bound, causal, rtol=0, atol=1e-10)


@given(seed=st.integers(0, 10**6), position=st.integers(0, 8))
def test_ar_2_context_logits_do_not_see_what_they_speak_of(seed, position):
    tokens = tokens_of(seed)
    changed = tokens.clone()
    changed[:, position:] = tokens_of(seed + 1)[:, position:]
    before, after = MODEL.context_logits(tokens), MODEL.context_logits(changed)
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])


@given(seed=st.integers(0, 10**6), prompt=st.integers(0, 5), window=st.sampled_from([None, 1, 3]))
def test_ar_3_level_zero_generation_is_the_naive_loop(seed, prompt, window):
    start = tokens_of(seed, length=9)[:, :prompt]
    written = start
    for _ in range(8):
        padded = torch.cat([written, written.new_zeros(len(written), 1)], 1)
        written = torch.cat([written, MODEL.context_logits(padded)[:, -1:].argmax(-1)], 1)
    out = MODEL.generate(
        start, 8, timestep_head=FixedTimestep(0), temperature=0, window=window, generator=generator(seed)
    )
    assert torch.equal(out.tokens, written[:, prompt:])
    assert out.nfe == 0
    assert (out.levels == 0).all()


def continuous_time_diffusion_bound(model, tokens, clock, noise, fresh, fresh_end):
    """-log p <= 1/2 int -SNR'(t) E|x - x̂(z_t, t)|^2 dt + reconstruction (Kingma et al. 2021), at t = 1 - .9 c, from 1 down to t_min.

    Written with its own evidence, posterior and schedule (alpha_bar = cos^2), for one token at a time.
    """
    embeddings = model.latent_space.weight
    t_min = 0.1

    def denoise(level, eps):
        cos, sin = math.cos(math.pi * level / 2), math.sin(math.pi * level / 2)
        if level == 1.0:
            cos = 0.0
        latents = cos * embeddings[tokens] + sin * eps
        hidden = model.refine(latents, torch.full(tokens.shape, level, dtype=torch.float64))
        logits = model.readout(hidden, embeddings)
        distance = (latents.unsqueeze(2) - cos * embeddings).square().sum(-1)
        return (logits - distance / (2 * sin**2)).log_softmax(-1)

    total = torch.zeros(tokens.shape, dtype=torch.float64)
    for row, c in enumerate(clock.tolist()):
        level = 1 - (1 - t_min) * c
        # The latent at t = 1 is pure noise, so the noise at a lower level is fresh.
        eps = noise if level == 1.0 else fresh
        log_p = denoise(level, eps)
        error = (embeddings[tokens] - log_p.exp() @ embeddings).square().sum(-1)
        half = math.pi * level / 2
        d_snr = -math.pi * math.cos(half) / math.sin(half) ** 3
        total[row] = (-0.5 * d_snr * (1 - t_min) * error)[row]
    reconstruction = -denoise(t_min, fresh_end).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return total, reconstruction


@given(seed=st.integers(0, 10**6))
def test_d_1_level_one_is_the_continuous_time_diffusion_bound(seed):
    tokens = tokens_of(seed)
    out = MODEL(tokens, levels=1.0, generator=generator(seed))
    # The noise in the order in which the model draws it.
    draws = generator(seed)
    shape = (*tokens.shape, D)
    noise = torch.randn(shape, generator=draws, dtype=torch.float64)
    clock = torch.rand(len(tokens), generator=draws, dtype=torch.float64)
    fresh = torch.randn(shape, generator=draws, dtype=torch.float64)
    fresh_end = torch.randn(shape, generator=draws, dtype=torch.float64)
    flow, reconstruction = continuous_time_diffusion_bound(MODEL, tokens, clock, noise, fresh, fresh_end)
    assert out.sketch_bits.abs().max() <= 1e-10
    torch.testing.assert_close(out.flow_bits, flow, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.reconstruction, reconstruction, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 10**6), level=st.floats(0.2, 1.0))
def test_d_2_one_exponential_step_is_ddim(seed, level):
    draws = generator(seed)
    latents = torch.randn(2, 5, D, generator=draws, dtype=torch.float64)
    now = torch.full((2, 5), level, dtype=torch.float64)
    after = now * torch.rand(2, 5, generator=draws, dtype=torch.float64).clamp(min=0.15 / level)
    field = MODEL.vector_field()
    stepped, _ = Exponential(schedule=MODEL.schedule).step(field, latents, now, after, None)
    # Song et al. 2021, Eq. 12 with sigma = 0: predict the clean latent and the noise, put them together again at the next level.
    clean = field.denoise(latents, now).latents
    alpha, next_alpha = torch.cos(math.pi * now / 2)[..., None] ** 2, torch.cos(math.pi * after / 2)[..., None] ** 2
    eps = (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    torch.testing.assert_close(stepped, next_alpha.sqrt() * clean + (1 - next_alpha).sqrt() * eps, rtol=1e-7, atol=1e-7)


def test_d_2_at_level_one_the_plan_knows_nothing_of_the_sketch():
    prompt = tokens_of(0)
    seen = []

    class Spy(Euler):
        def step(self, field, latents, level, next_level, state):
            seen.append(latents)
            return super().step(field, latents, level, next_level, state)

    for prior in (lambda logits, _: logits.argmax(-1), lambda logits, _: logits.argmin(-1)):
        seen.clear()
        MODEL.generate(
            prompt, 6, solver=Spy(), timestep_head=FixedTimestep(1), prior=prior, max_steps=4, generator=generator(3)
        )
        latents = seen[0]
        expected, _ = Draws.of(generator(3), len(prompt), prompt.device).take(6, MODEL.bos)
        assert torch.equal(latents, expected)


def sequential_levels(model, tokens, noise, prompt=0):
    """Position by position with a cache, as generation sketches."""
    state = Prompted(model, tokens[:, :0], None, tokens.shape[1])
    embeddings, levels = state.denoiser.embeddings, []
    for index in range(tokens.shape[1]):
        level = model.timestep_head(state.hidden, state.speak().unsqueeze(1))[:, 0]
        level = torch.where((level > model.schedule.t_min) & (index >= prompt), level, 0.0)
        clean = embeddings[tokens[:, index]]
        latent = torch.where(level[:, None] > 0, model.schedule.noised(clean, noise[:, index], level), clean)
        state.read(latent[:, None], level[:, None])
        levels.append(level)
    return torch.stack(levels, 1)


@given(seed=st.integers(0, 10**6), prompt=st.integers(0, 4))
def test_l_1_levels_found_in_parallel_are_those_of_the_sequential_sketch(seed, prompt):
    tokens = tokens_of(seed)
    noise = torch.randn(*tokens.shape, D, generator=generator(seed), dtype=torch.float64)
    with torch.no_grad():
        parallel = learned_levels(MODEL, as_batch(MODEL, tokens, prompt), noise)
        sequential = sequential_levels(MODEL, tokens, noise, prompt)
    torch.testing.assert_close(parallel, sequential, rtol=0, atol=1e-9)
    assert parallel[:, prompt:].std() > 0.01, "levels that are all alike would make this test empty"


@given(seed=st.integers(0, 10**6), max_steps=st.sampled_from([2, 3]))
def test_levels_snapped_at_one_step_are_those_that_generation_sketches_at(seed, max_steps):
    tokens, snap = tokens_of(seed, 12), 1 / max_steps
    noise, _ = Draws.of(generator(seed), len(tokens), tokens.device).take(9, MODEL.bos)
    batch, positions = as_batch(MODEL, tokens), iter(range(9))
    written = MODEL.generate(
        tokens[:, :0], 9, prior=lambda *_: tokens[:, next(positions)], max_steps=max_steps, generator=generator(seed)
    )
    with torch.no_grad():
        found = learned_levels(MODEL, batch, noise, snap)
        free = learned_levels(MODEL, batch, noise)
        part = as_part(None, batch, batch.present)
        out = measure(MODEL, batch, batch.present, None, early_stop, Given(noise), part, 1, snap)
    torch.testing.assert_close(found, written.levels, rtol=0, atol=1e-9)
    torch.testing.assert_close(out.levels, written.levels, rtol=0, atol=1e-9)
    assert not ((found > 0) & (found < snap)).any()
    assert ((free > 0) & (free < snap)).any(), "levels that all lie above would make this test empty"


def test_learned_levels_are_what_the_bound_uses():
    tokens = tokens_of(5)
    out = MODEL(tokens, generator=generator(1))
    noise = torch.randn(*tokens.shape, D, generator=generator(1), dtype=torch.float64)
    expected = learned_levels(MODEL, as_batch(MODEL, tokens), noise)
    assert torch.equal(out.levels, expected)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_no_path_leaves_anything_undefined(path):
    tokens = tokens_of(2)
    draws = generator(4)
    levels = torch.rand(tokens.shape, generator=draws, dtype=torch.float64).round(decimals=1)
    out = MODEL(tokens, levels=levels, path=path, generator=draws)
    assert out.bound.isfinite().all()
    assert (out.flow_bits[levels <= 0.1] == 0).all()
