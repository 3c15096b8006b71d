"""The cache against a list for each sequence, and the backbone behind it against the backbone without (M-1)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.core import Cache, Causal, Window
from tests.conftest import generator, random_model

MODEL = random_model()
BACKBONE, D = MODEL.backbone, MODEL.latent_space.dim
HEADS, DIM = 2, 3


@st.composite
def operations(draw: st.DrawFn, batch: int, most: int = 24) -> list[tuple[str, object]]:
    """Writes that are kept or not, rewinds of all or of each, and choices of sequences, such that each can be done."""
    lengths, found = [0] * batch, []
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["store", "store", "scratch", "rewind", "rewind each", "select"]))
        if kind in ("store", "scratch"):
            if max(lengths) + 1 > most:
                continue
            count = draw(st.integers(1, min(4, most - max(lengths))))
            found.append((kind, count))
            lengths = [length + count * (kind == "store") for length in lengths]
        elif kind == "rewind":
            count = draw(st.integers(0, min(lengths)))
            found.append((kind, count))
            lengths = [length - count for length in lengths]
        elif kind == "rewind each":
            counts = [draw(st.integers(0, length)) for length in lengths]
            found.append((kind, counts))
            lengths = [length - count for length, count in zip(lengths, counts, strict=True)]
        else:
            rows = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=len(lengths)))
            found.append((kind, rows))
            lengths = [lengths[row] for row in rows]
    return found


def lengths_of(cache: Cache, batch: int) -> list[int]:
    return [cache.lengths] * batch if isinstance(cache.lengths, int) else cache.lengths.tolist()


@given(steps=operations(3), capacity=st.integers(1, 9), limited=st.booleans(), seed=st.integers(0, 99))
def test_the_cache_is_a_list_for_each_sequence(steps, capacity, limited, seed):
    draws, most = generator(seed), capacity
    cache = Cache(capacity, 28 if limited else None)
    lists: list[list[torch.Tensor]] = [[], [], []]
    for kind, value in steps:
        if kind in ("store", "scratch"):
            shape = (len(lists), HEADS, value, DIM)
            keys, values = (torch.randn(shape, generator=draws) for _ in range(2))
            at, slots = cache.next_slots(value), cache.length + value
            found = cache.write(0, keys, values, at, slots)
            joined = cache.join(0, keys, values, at, slots)
            longer = [each + [(keys[b, :, i], values[b, :, i]) for i in range(value)] for b, each in enumerate(lists)]
            assert cache.ends(value) is None or list(cache.ends(value)) == [len(each) for each in longer]
            for b, each in enumerate(longer):
                for s, pair in enumerate(each):
                    for which in (0, 1):
                        assert torch.equal(found[which][b, :, s], pair[which])
                        assert torch.equal(joined[which][b, :, s], pair[which])
            most = max(most, slots)
            if kind == "store":
                cache.advance(value)
                lists = longer
        elif kind == "select":
            cache.select(torch.tensor(value))
            lists = [list(lists[row]) for row in value]
        else:
            cache.rewind(value if kind == "rewind" else torch.tensor(value))
            each = [value] * len(lists) if kind == "rewind" else value
            lists = [kept[: len(kept) - count] for kept, count in zip(lists, each, strict=True)]
        assert lengths_of(cache, len(lists)) == [len(each) for each in lists]
        assert cache.length == max(len(each) for each in lists)
        assert cache.capacity < 2 * most or cache.capacity == capacity
        assert not limited or cache.capacity <= 28
    if cache.length:
        for b, each in enumerate(lists):
            for s, pair in enumerate(each):
                assert all(torch.equal(read[b, :, s], kept) for read, kept in zip(cache.read(0), pair, strict=True))


def inputs(seed: int, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = generator(seed)
    latents = torch.randn(batch, length, D, generator=draws, dtype=torch.float64)
    return latents, torch.rand(batch, length, generator=draws, dtype=torch.float64)


@given(steps=operations(3), seed=st.integers(0, 99))
def test_m_1_whatever_happened_to_the_cache_a_sequence_continues_as_if_alone(steps, seed):
    """A sketch (stored) or a window (not stored) behind what each sequence has read equals one pass over that sequence alone."""
    cache, read, level = Cache(2), [torch.zeros(0, D, dtype=torch.float64)] * 3, [torch.zeros(0).double()] * 3
    for index, (kind, value) in enumerate(steps):
        if kind in ("store", "scratch"):
            new, new_level = inputs(seed + index, len(read), value)
            window = kind == "scratch"
            mask, own = (Window(0), torch.ones(value, dtype=torch.bool)) if window else (Causal(), None)
            with torch.no_grad():
                found = BACKBONE(new, new_level, mask=mask, own=own, cache=cache, store=not window)
            for b in range(len(read)):
                whole, whole_level = torch.cat([read[b], new[b]]), torch.cat([level[b], new_level[b]])
                prompt = len(read[b])
                expected = BACKBONE(
                    whole[None],
                    whole_level[None],
                    mask=Window(prompt) if window else Causal(),
                    own=torch.arange(len(whole)) >= prompt if window else None,
                )[0, prompt:]
                torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-12)
                if not window:
                    read[b], level[b] = whole, whole_level
        elif kind == "select":
            cache.select(torch.tensor(value))
            read, level = [read[row] for row in value], [level[row] for row in value]
        else:
            cache.rewind(value if kind == "rewind" else torch.tensor(value))
            each = [value] * len(read) if kind == "rewind" else value
            read = [kept[: len(kept) - count] for kept, count in zip(read, each, strict=True)]
            level = [kept[: len(kept) - count] for kept, count in zip(level, each, strict=True)]


@given(seed=st.integers(0, 99), taken=st.lists(st.integers(0, 4), min_size=2, max_size=2))
def test_a_window_behind_the_cache_has_its_gradient(seed, taken):
    latents, level = inputs(seed, 2, 8)
    cache = Cache(5)
    with torch.no_grad():
        BACKBONE(latents[:, :5], level[:, :5], cache=cache, store=True)
    cache.rewind(torch.tensor(taken))
    window = latents[:, 5:].requires_grad_()
    own = torch.ones(3, dtype=torch.bool)
    behind = BACKBONE(window, level[:, 5:], mask=Window(0), own=own, cache=cache)
    found = torch.autograd.grad(behind.sin().sum(), window)[0]
    with torch.no_grad():
        again = BACKBONE(window, level[:, 5:], mask=Window(0), own=own, cache=cache)
    torch.testing.assert_close(behind, again, rtol=0, atol=1e-12)
    for b, less in enumerate(taken):
        prompt = 5 - less
        alone = latents[b : b + 1, 5:].detach().requires_grad_()
        whole = torch.cat([latents[b : b + 1, :prompt].detach(), alone], 1)
        levels = torch.cat([level[b : b + 1, :prompt], level[b : b + 1, 5:]], 1)
        out = BACKBONE(whole, levels, mask=Window(prompt), own=torch.arange(prompt + 3) >= prompt)[:, prompt:]
        expected = torch.autograd.grad(out.sin().sum(), alone)[0]
        torch.testing.assert_close(found[b : b + 1], expected, rtol=0, atol=1e-11)


@given(seed=st.integers(0, 99), taken=st.lists(st.integers(0, 2), min_size=2, max_size=2), prompt=st.integers(0, 3))
def test_what_is_stored_has_its_gradient_in_the_pass_that_stores_it(seed, taken, prompt):
    latents, level = inputs(seed, 2, prompt + 4)
    cache, weights = Cache(2), [block.attention.k.weight for block in BACKBONE.blocks]
    with torch.no_grad():
        if prompt:
            BACKBONE(latents[:, :prompt], level[:, :prompt], cache=cache, store=True)
            cache.rewind(torch.tensor(taken).clamp(max=prompt))
    new = latents[:, prompt:].requires_grad_()
    behind = BACKBONE(new, level[:, prompt:], cache=cache, store=True)
    found = torch.autograd.grad(behind.sin().sum(), [new, *weights])
    expected = [torch.zeros_like(x) for x in found]
    for b in range(2):
        first = prompt - min(taken[b], prompt)
        alone = new[b : b + 1].detach().requires_grad_()
        with torch.no_grad():
            read = Cache(8)
            if first:
                BACKBONE(latents[b : b + 1, :first], level[b : b + 1, :first], cache=read, store=True)
        out = BACKBONE(alone, level[b : b + 1, prompt:], cache=read)
        own, *shared = torch.autograd.grad(out.sin().sum(), [alone, *weights])
        expected[0][b] = own[0]
        for total, part in zip(expected[1:], shared, strict=True):
            total += part
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    again = Cache(8)
    with torch.no_grad():
        if prompt:
            BACKBONE(latents[:, :prompt], level[:, :prompt], cache=again, store=True)
            again.rewind(torch.tensor(taken).clamp(max=prompt))
        BACKBONE(new, level[:, prompt:], cache=again, store=True)
    for layer in range(len(BACKBONE.blocks)):
        for stored, kept in zip(cache.read(layer), again.read(layer), strict=True):
            assert not stored.requires_grad
            assert torch.equal(stored, kept)


def test_keys_and_values_of_some_tokens_may_be_made_anew():
    """Tokens of a window that have changed, others in each sequence, while the rest of the window keeps its keys and values."""
    cache = Cache(8)
    first, second = (torch.randn(2, HEADS, 6, DIM, generator=generator(seed)) for seed in (0, 1))
    cache.write(0, first, first, 0, 6)
    some = torch.tensor([[1, 4], [0, 5]])
    new = torch.stack([second[b][:, some[b]] for b in range(2)])
    keys, values = cache.write(0, new, new, some, 6)
    expected = first.clone()
    for b in range(2):
        expected[b][:, some[b]] = second[b][:, some[b]]
    assert torch.equal(keys, expected)
    assert torch.equal(values, expected)


def test_what_nobody_owns_is_never_nan():
    """Storage that was never written has weight zero, which does not silence NaN."""
    latents, level = inputs(0, 2, 4)
    cache = Cache(64)
    with torch.no_grad():
        BACKBONE(latents, level, cache=cache, store=True)
        cache.rewind(torch.tensor([0, 4]))
        for keys, values in cache._layers:
            keys[1], values[1] = 1e30, 1e30
            assert keys[:, 4:].count_nonzero() == keys[1:, 4:].numel()
        out = BACKBONE(latents, level, cache=cache)
        alone = BACKBONE(latents[1:], level[1:])
    torch.testing.assert_close(out[1:], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda cache: Cache(0), "capacity is 0"),
        (lambda cache: Cache(4, 3), "capacity is 4, limit 3"),
        (lambda cache: cache.rewind(4), "cannot take back 4 tokens of a cache whose shortest sequence has 3"),
        (lambda cache: cache.rewind(-1), "cannot take back -1"),
        (lambda cache: cache.rewind(torch.tensor([4, 0])), r"cannot take back \[4, 0\] .* have \[3, 3\]"),
        (lambda cache: cache.rewind(torch.tensor([-1, 0])), r"cannot take back \[-1, 0\]"),
        (lambda cache: cache.rewind(torch.tensor([1, 0, 1])), r"counts have shape \(3,\); this cache needs \(2,\)"),
        (lambda cache: cache.rewind(torch.tensor(1)), r"counts have shape \(\); this cache needs \(2,\)"),
        (lambda cache: store(cache, 1, batch=1), r"1 sequences in torch.float32 do not fit a cache of 2"),
        (lambda cache: store(cache, 1, dtype=torch.bfloat16), r"in torch.bfloat16 do not fit .*autocast"),
        (lambda cache: cache.join(0, *[torch.zeros(1, HEADS, 1, DIM)] * 2, 3, 4), r"1 sequences .* do not fit"),
        (lambda cache: store(cache, 3), "6 slots are needed, and this cache is limited to 5"),
    ],
)
def test_what_a_cache_cannot_do_it_refuses(do, message):
    cache = Cache(2, 5)
    store(cache, 3)
    with pytest.raises(ValueError, match=message):
        do(cache)


def store(cache: Cache, count: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> None:
    new = torch.zeros(batch, HEADS, count, DIM, dtype=dtype)
    cache.write(0, new, new, cache.next_slots(count), cache.length + count)
    cache.advance(count)
