"""Attention, its cache (M-1), and the backbone's promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.core import Cache, Causal, LayerNorm, Pattern, RMSNorm, Sdpa, Transformer, Window
from evo.core.attention import Attention
from evo.core.backends import Attend
from evo.core.rotary import Rotary, RotaryTable, rotate
from tests.conftest import generator, random_model

MODEL = random_model()
BACKBONE, D = MODEL.backbone, MODEL.latent_space.dim


def inputs(seed: int, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = generator(seed)
    latents = torch.randn(batch, length, D, generator=draws, dtype=torch.float64)
    return latents, torch.rand(batch, length, generator=draws, dtype=torch.float64)


@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_m_1_cached_and_uncached_agree(seed, cuts):
    latents, level = inputs(seed, 2, sum(cuts))
    whole = BACKBONE(latents, level)
    cache, rows, start = Cache(2), [], 0
    with torch.no_grad():
        for count in cuts:
            here = slice(start, start + count)
            rows.append(BACKBONE(latents[:, here], level[:, here], cache=cache, store=True))
            start += count
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=0, atol=1e-12)
    assert cache.length == start
    assert cache.capacity < 2 * max(2, start)


@given(seed=st.integers(0, 10**6), prompt=st.integers(1, 5))
def test_m_1_the_prompt_does_not_depend_on_the_window(seed, prompt):
    latents, level = inputs(seed, 2, 9)
    other, _ = inputs(seed + 1, 2, 9)
    other[:, :prompt] = latents[:, :prompt]
    own = torch.arange(9) >= prompt
    caches = []
    for z in (latents, other):
        cache = Cache(9)
        with torch.no_grad():
            BACKBONE(z, level, mask=Window(prompt), own=own, cache=cache, store=True)
        caches.append(cache)
    for layer in range(len(BACKBONE.blocks)):
        for first, second in zip(caches[0].read(layer), caches[1].read(layer), strict=True):
            assert torch.equal(first[:, :, :prompt], second[:, :, :prompt])
            assert not torch.equal(first, second)


@given(seed=st.integers(0, 10**6), prompt=st.integers(1, 5))
def test_m_1_a_window_behind_a_cached_prompt_is_the_window_in_one_pass(seed, prompt):
    latents, level = inputs(seed, 2, 9)
    own = torch.arange(9) >= prompt
    whole = BACKBONE(latents, level, mask=Window(prompt), own=own)[:, prompt:]
    cache = Cache(prompt)
    with torch.no_grad():
        BACKBONE(latents[:, :prompt], level[:, :prompt], cache=cache, store=True)
    behind = BACKBONE(latents[:, prompt:], level[:, prompt:], mask=Window(prompt), own=own[prompt:], cache=cache)
    torch.testing.assert_close(behind, whole, rtol=0, atol=1e-12)
    assert cache.length == prompt


def test_a_rewound_cache_forgets():
    latents, level = inputs(0, 1, 6)
    cache = Cache(1)
    with torch.no_grad():
        BACKBONE(latents, level, cache=cache, store=True)
        cache.rewind(3)
        again = BACKBONE(latents[:, 3:], level[:, 3:], cache=cache, store=True)
    torch.testing.assert_close(again, BACKBONE(latents, level)[:, 3:], rtol=0, atol=1e-12)


@given(seed=st.integers(0, 10**6), position=st.integers(0, 7))
def test_levels_are_per_token(seed, position):
    latents, level = inputs(seed, 1, 8)
    changed = level.clone()
    changed[0, position] = (level[0, position] + 0.5) % 1
    before, after = BACKBONE(latents, level), BACKBONE(latents, changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.allclose(before[:, position], after[:, position], atol=1e-6)


def test_at_level_zero_the_level_embedding_is_silent():
    latents, level = inputs(0, 2, 5)
    expected = BACKBONE(latents, torch.zeros_like(level))
    model = random_model()
    torch.nn.init.normal_(model.backbone.level_embedding.linear.weight)
    assert torch.equal(model.backbone(latents, torch.zeros_like(level)), expected)


def test_narrow_weights_leave_positions_and_levels_distinct():
    """In bfloat16 there are no odd numbers above 256; positions are never narrowed, and so their attention stays near that of float32."""
    wide = random_model(dtype=torch.float32, context=900)
    latents = torch.randn(1, 900, D, generator=generator())
    level = torch.rand(1, 900, generator=generator(1))
    with torch.no_grad():
        narrow = wide.backbone.bfloat16()
        rounded = narrow(latents, level).float()
        exact = narrow.float()(latents, level)
    early, late = ((rounded - exact)[:, part].abs().mean() for part in (slice(0, 250), slice(650, 900)))
    assert late < 1.5 * early


@pytest.mark.parametrize("norm", [RMSNorm(), LayerNorm()], ids=["rms", "layer"])
def test_under_autocast_heads_are_normalised_in_the_precision_of_the_weights(norm):
    """That is: as if one had rounded the products around the norm, and nothing else."""
    attention = Attention(32, 4, 2, qk_norm=norm)
    torch.nn.init.normal_(attention.q_norm.weight)
    torch.nn.init.normal_(attention.k_norm.weight)
    x, seen = torch.randn(2, 5, 32, generator=generator()), []
    pattern = Pattern(mask=Causal(), queries=0, count=5, keys=5, batch=2, device=torch.device("cpu"))

    class Seen(Sdpa):
        def attend(self, q, k, v, pattern, dropout=0.0):
            seen.extend([q, k])
            return super().attend(q, k, v, pattern, dropout)

    with torch.autocast("cpu", torch.bfloat16):
        attention(x, None, Attend(Seen(), pattern))
        products = [linear(x).float().unflatten(-1, (-1, 8)) for linear in (attention.q, attention.k)]
    exact = [attention.q_norm(products[0]), attention.k_norm(products[1])]
    for found, expected in zip(seen, exact, strict=True):
        assert torch.equal(found, expected.transpose(1, 2).bfloat16())


@given(shift=st.integers(1, 20))
def test_rotary_embedding_is_relative(shift):
    table = RotaryTable(Rotary(), 8)
    q, k = torch.randn(2, 8, generator=generator(shift), dtype=torch.float64)

    def turned(x, position):
        rotation = table(torch.tensor([[position]]), torch.float64, torch.float64)
        return rotate(x.view(1, 1, 1, 8), rotation).flatten()

    near, far = turned(q, 7) @ turned(k, 3), turned(q, 7 + shift) @ turned(k, 3 + shift)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-12)


def test_grouped_heads_are_repeated_heads():
    grouped = Attention(32, 4, 2).double()
    full = Attention(32, 4).double()
    full.q.load_state_dict(grouped.q.state_dict())
    full.out.load_state_dict(grouped.out.state_dict())
    for name in ("k", "v"):
        weight = getattr(grouped, name).weight.detach().view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
        getattr(full, name).weight.data.copy_(weight)
    x = torch.randn(2, 5, 32, generator=generator(), dtype=torch.float64)
    rotation = RotaryTable(Rotary(), 8)(torch.arange(5).unsqueeze(0), torch.float64, torch.float64)
    pattern = Pattern(mask=Causal(), queries=0, count=5, keys=5, batch=2, device=torch.device("cpu"))
    attend = Attend(Sdpa(), pattern)
    torch.testing.assert_close(grouped(x, rotation, attend), full(x, rotation, attend), rtol=0, atol=1e-12)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="width 30, heads 4"):
        Attention(30, 4)
    with pytest.raises(ValueError, match="kv_heads 3"):
        Attention(32, 4, 3)
    backbone = Transformer(4, 16, 1, 2, positions=5)
    with pytest.raises(ValueError, match=r"6 positions do not fit this model's 5"):
        backbone(torch.zeros(1, 6, 4), torch.zeros(1, 6))
