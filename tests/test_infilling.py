"""Writing between two texts: what is seen of them, and what is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evo.core.denoiser import Denoiser, VectorField
from evo.core.draws import Draws
from evo.core.order import Order
from evo.core.speculation import Speculation
from evo.core.suffix import Suffix, between
from evo.heads import FixedTimestep, LinearDecoder, NucleusPrior
from evo.schedules import early_stop, late_start, step_counts
from evo.solvers import Exponential, Heun, TorchDiffEq
from tests.conftest import generator, random_model

MODEL = random_model()
MODELS = {
    "attended": MODEL,
    "detached": random_model(bos="detached"),
    "learned positions": random_model(rotary=None),
    "self-conditioned": random_model(self_conditioning=True),
}
V = MODEL.latent_space.vocab_size
SEEDS = st.integers(0, 10**6)


def text(seed: int, length: int, batch: int = 3) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=generator(seed))


def counts(seed: int, low: int, high: int, batch: int = 3) -> Tensor:
    return torch.randint(low, high + 1, (batch,), generator=generator(seed))


def order(model, size: int, prompt: Tensor, end: Tensor, suffix: Tensor) -> Order:
    return Order.of(size, model.bos_slots, prompt, end, suffix)


def naive(model, prefix: list[int], suffix: list[int], length: int) -> list[int]:
    """Greedy, with everything read anew for each token, in an order written down here: no cache, no batch, no `Order`."""
    embeddings, bos = model.latent_space.weight, model.bos_slots
    behind, written = bos + len(prefix) + length, []
    for _ in range(length):
        rows = [(embeddings[token], bos + place) for place, token in enumerate(prefix)]
        rows = [(model.bos, 0)] * bos + rows
        again = rows[-1:] if suffix else []
        rows += [(embeddings[token], behind + place) for place, token in enumerate(suffix)] + again
        rows += [(embeddings[token], bos + len(prefix) + place) for place, token in enumerate(written)]
        if not bos and not prefix and not written:
            hidden = model.first_hidden(1)
        else:
            latents, positions = torch.stack([latent for latent, _ in rows])[None], [place for _, place in rows]
            hidden = model.backbone(
                latents, torch.zeros(latents.shape[:2]).double(), positions=torch.tensor([positions])
            )
        written.append(int(model.readout(hidden[:, -1:], embeddings).argmax()))
    return written


@pytest.mark.parametrize("name", ["attended", "detached", "learned positions"])
@given(seed=SEEDS)
def test_at_level_0_infilling_is_the_naive_loop(name, seed):
    model = MODELS[name]
    prefix, suffix = text(seed, 4), text(seed + 1, 5)
    before, behind, length = counts(seed, 0, 4), counts(seed + 2, 0, 5), counts(seed + 3, 1, 4)
    out = model.infill(
        prefix,
        suffix,
        length,
        prefix_lengths=before,
        suffix_lengths=behind,
        timestep_head=FixedTimestep(0),
        temperature=0,
        generator=generator(seed),
    )
    assert torch.equal(out.lengths, length)
    for row in range(3):
        expected = naive(
            model, prefix[row, : before[row]].tolist(), suffix[row, : behind[row]].tolist(), int(length[row])
        )
        assert out.tokens[row, : length[row]].tolist() == expected


@torch.no_grad()
def dense_euler(model, tokens: Tensor, order: Order, levels: Tensor, noise: Tensor, max_steps: int) -> Tensor:
    """Every token of every sequence in every step, without a cache: tokens (B, N)."""
    embeddings, estimate = model.latent_space.weight, torch.zeros_like(noise)
    denoiser = Denoiser.of(model.latent_space, model.schedule)

    def network(latents: Tensor, level: Tensor) -> Tensor:
        given = {"estimate": estimate} if model.self_conditioned else {}
        return model.readout(model.refine(latents, level, order=order, **given), embeddings)

    field = VectorField(network, denoiser)
    plan = early_stop(levels, max_steps, model.schedule.t_min)
    clean = embeddings[tokens]
    latents = torch.where((levels > 0)[..., None], model.schedule.noised(clean, noise, levels), clean)
    for step in range(max_steps):
        level, after = plan[:, step], plan[:, step + 1]
        found = field.denoise(latents, level)
        estimate = found.latents
        moved = latents + (after - level)[..., None] * field.velocity(found, latents, level)
        tokens = torch.where((level > 0) & (after == 0), found.log_probs.argmax(-1), tokens)
        latents = torch.where((after > 0)[..., None], moved, embeddings[tokens])
    return tokens


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(seed=SEEDS, level=st.sampled_from([0.4, 1.0]))
def test_at_other_levels_it_is_the_dense_refinement(name, seed, level):
    """At level 1 nothing of the sketch remains, and none is made; below, every token is sketched greedily as at level 0 here."""
    model, size = MODELS[name], 4
    prefix, suffix = text(seed, 3), text(seed + 1, 4)
    before, behind, length = counts(seed, 0, 3), counts(seed + 2, 0, 4), counts(seed + 3, 1, size)
    seeds = [seed + row for row in range(3)]
    out = model.infill(
        prefix,
        suffix,
        length,
        prefix_lengths=before,
        suffix_lengths=behind,
        timestep_head=FixedTimestep(level),
        prior=lambda logits, uniform: torch.full_like(uniform, 2, dtype=torch.int64),
        max_steps=5,
        generator=[generator(each) for each in seeds],
    )
    noise = Draws.of([generator(each) for each in seeds], 3, prefix.device).take(size, model.latent_space.weight)[0]
    for row in range(3):
        start, stop = int(before[row]), int(before[row] + length[row])
        parts = prefix[row, :start], torch.full((int(length[row]),), 2), suffix[row, : behind[row]]
        tokens = torch.cat(parts)[None]
        levels, drawn = torch.zeros(tokens.shape).double(), torch.zeros(1, tokens.shape[1], noise.shape[2]).double()
        levels[:, start:stop], drawn[:, start:stop] = level, noise[row, : length[row]]
        end = torch.tensor([tokens.shape[1]])
        among = order(model, tokens.shape[1], before[row : row + 1], end, behind[row : row + 1])
        expected = dense_euler(model, tokens, among, levels, drawn, 5)
        assert out.tokens[row, : length[row]].tolist() == expected[0, start:stop].tolist()
    assert out.nfe == int(step_counts(torch.tensor(level), 5))


@settings(max_examples=12)
@given(seed=SEEDS)
def test_a_sequence_is_infilled_as_if_alone(seed):
    prefix, suffix = text(seed, 4), text(seed + 1, 5)
    before, behind, length = counts(seed, 0, 4), counts(seed + 2, 0, 5), counts(seed + 3, 1, 5)
    options = {"max_steps": 5, "decoder": LinearDecoder(prior=NucleusPrior(top_p=1.0, temperature=1.0))}
    together = MODEL.infill(
        prefix,
        suffix,
        length,
        prefix_lengths=before,
        suffix_lengths=behind,
        generator=[generator(row) for row in range(3)],
        **options,
    )
    for row in range(3):
        one = slice(row, row + 1)
        alone = MODEL.infill(
            prefix[one, : before[row]],
            suffix[one, : behind[row]],
            int(length[row]),
            generator=[generator(row)],
            **options,
        )
        assert torch.equal(alone.tokens[0], together.tokens[row, : length[row]])
        torch.testing.assert_close(alone.levels[0], together.levels[row, : length[row]], rtol=0, atol=1e-12)


@given(
    seed=SEEDS, options=st.sampled_from([{}, {"timestep_head": FixedTimestep(0)}, {"timestep_head": FixedTimestep(1)}])
)
def test_without_a_suffix_it_is_generation(seed, options):
    prefix, asked = text(seed, 4), {"max_steps": 4, "window": 3, "stop": 0, **options}
    out = MODEL.infill(prefix, prefix[:, :0], max_length=6, generator=generator(seed), **asked)
    generated = MODEL.generate(prefix, 6, generator=generator(seed), **asked)
    assert torch.equal(out.tokens, generated.tokens)
    assert torch.equal(out.levels, generated.levels)
    padded = MODEL.infill(
        prefix,
        text(seed + 1, 3),
        max_length=6,
        suffix_lengths=torch.zeros(3, dtype=torch.int64),
        generator=generator(seed),
        **asked,
    )
    assert torch.equal(padded.tokens, generated.tokens)


@pytest.mark.parametrize("half", ["sketch", "refine"])
@given(seed=SEEDS, before=st.integers(0, 3), behind=st.integers(1, 3))
def test_who_sees_whom(half, seed, before, behind):
    """Bit for bit: the prefix sees itself, the suffix the prefix too, the window both; in the sketch it does not see what is to come."""
    size = before + 4 + behind
    tokens, draws = text(seed, size), generator(seed)
    lengths = [torch.full((3,), each) for each in (before, size, behind)]
    among = order(MODEL, size, *lengths)
    levels = torch.zeros(3, size, dtype=torch.float64)
    levels[:, before : size - behind] = torch.rand(3, 4, generator=draws, dtype=torch.float64)
    clean = MODEL.latent_space.weight[tokens].detach()

    def rows(changed: slice) -> Tensor:
        latents = clean.clone()
        latents[:, changed] += torch.randn(3, size, clean.shape[2], generator=draws, dtype=torch.float64)[:, changed]
        with torch.no_grad():
            return getattr(MODEL, half)(latents, levels, order=among)

    window, right = slice(before, size - behind), slice(size - behind, size)
    base, other_window, other_suffix = rows(slice(0, 0)), rows(window), rows(right)
    assert torch.equal(base[:, :before], other_window[:, :before])
    assert torch.equal(base[:, :before], other_suffix[:, :before])
    assert torch.equal(base[:, right], other_window[:, right])
    assert (base[:, window] != other_suffix[:, window]).any(-1).all()
    for place in range(before, size - behind):
        changed = (base != rows(slice(place, place + 1))).any(-1)[:, window]
        later = torch.arange(before, size - behind) > place
        assert (changed if half == "refine" else changed == later).all()


def test_what_is_cached_depends_on_nothing_to_its_right_and_has_the_size_it_says():
    prefix, suffix = text(0, 4), text(1, 5)
    before, behind = torch.tensor([4, 0, 2]), torch.tensor([0, 5, 3])
    with torch.no_grad():
        states = [
            between(MODEL, prefix, before, Suffix(tokens=tokens, lengths=behind, gap=torch.tensor([3, 6, 1])), 6)
            for tokens in (suffix, (suffix + 1) % V)
        ]
        alone = between(MODEL, prefix, before, None, 6)
    assert states[0].cache.lengths.tolist() == [5, 7, 7], "BOS, prefix, suffix, and the row before the window once more"
    assert states[0].cache.limit == 1 + 4 + 5 + 1 + 6
    for layer in range(2):
        kept = zip(states[0].cache.read(layer), states[1].cache.read(layer), alone.cache.read(layer), strict=True)
        for first, second, without in kept:
            for row in range(3):
                until = 1 + int(before[row])
                assert torch.equal(first[row, :, :until], without[row, :, :until])
                assert torch.equal(first[row, :, :until], second[row, :, :until])
                if behind[row]:
                    assert not torch.equal(first[row, :, until:], second[row, :, until : first.shape[2]])


def test_lengths_are_exact_or_end_at_a_stop_token():
    prefix, suffix = text(0, 3, batch=24), text(1, 4, batch=24)
    stop = list(range(4))
    exact = MODEL.infill(prefix, suffix, 5, stop=stop, max_steps=4, generator=generator(0))
    assert (exact.lengths == 5).all()
    assert (exact.tokens[:, :4] >= 4).all(), "a stop token would have ended it"
    most = torch.tensor([6, 2, 4]).repeat(8)
    free = MODEL.infill(prefix, suffix, max_length=most, min_length=2, stop=stop, max_steps=4, generator=generator(0))
    assert ((free.lengths >= 2) & (free.lengths <= most)).all()
    assert (free.lengths < most).any()
    for row in torch.nonzero(free.lengths < most)[:, 0]:
        assert free.tokens[row, free.lengths[row] - 1] < 4


def test_where_the_suffix_stands_matters():
    """With `max_length` the suffix stands behind all the room there is, so that more room is another text."""
    prefix, suffix, options = text(0, 3), text(1, 4), {"timestep_head": FixedTimestep(0)}
    near, far = (MODEL.infill(prefix, suffix, max_length=most, temperature=0, **options).tokens for most in (6, 20))
    assert not torch.equal(near, far[:, :6])


@pytest.mark.parametrize(
    "options",
    [
        {"solver": Heun()},
        {"solver": Exponential(schedule=MODEL.schedule), "plan": late_start},
        {"solver": TorchDiffEq("dopri5", rtol=1e-3, atol=1e-3)},
        {"refresh": 3},
        {"fidelity": 0.6},
        {"window": 3},
        {"stride": 2},
        {"trajectory": True},
        {"temperature": 0.0, "top_p": 0.5},
    ],
    ids=str,
)
def test_the_options_are_those_of_generate(options):
    run = [MODEL.infill(text(0, 3), text(1, 4), 7, max_steps=4, generator=generator(0), **options) for _ in range(2)]
    assert run[0].tokens.shape == (3, 7)
    assert torch.equal(run[0].tokens, run[1].tokens)
    assert (run[0].trajectory is not None) == ("trajectory" in options)


def test_speculation_changes_no_text():
    before, behind, length = torch.tensor([3, 0, 2]), torch.tensor([4, 2, 0]), [7, 5, 6]
    asked = {"prefix_lengths": before, "suffix_lengths": behind}
    plain, guessed = (
        MODEL.infill(text(0, 3), text(1, 4), length, generator=generator(0), **asked, **options)
        for options in ({"timestep_head": FixedTimestep(0)}, {"speculation": Speculation(run=3)})
    )
    assert torch.equal(plain.tokens, guessed.tokens)


def test_the_whole_context_can_be_used():
    model = random_model(context=12)
    out = model.infill(text(0, 4), text(1, 3), 5, max_steps=3, generator=generator(0))
    assert out.tokens.shape == (3, 5)
    with pytest.raises(ValueError, match="a prefix of 4 tokens, 6 new ones and a suffix of 3 do not fit"):
        model.infill(text(0, 4), text(1, 3), 6)


def test_guesses_stay_within_the_context_beside_sequences_that_have_a_suffix():
    """A sequence that runs ahead of the others guesses as far as the cache of all goes; without a suffix its slots are its positions."""
    model = random_model(context=15, rotary=None)
    with torch.no_grad():
        # Guesses are right whenever the number drawn for the token is small, so that sequences fall apart.
        model.readout.linear.weight.zero_()
        model.readout.bias.copy_(torch.arange(V) / 2)

    def prior(logits, uniform):
        return torch.where(uniform < 0.7, logits.argmax(-1), logits.argmin(-1))

    asked = {"suffix_lengths": torch.tensor([0, 1, 1]), "prior": prior}
    for seed in range(4):
        plain, guessed = (
            model.infill(text(0, 4), text(1, 1), 10, generator=generator(seed), **asked, **options)
            for options in ({"timestep_head": FixedTimestep(0)}, {"speculation": Speculation(run=9)})
        )
        assert torch.equal(plain.tokens, guessed.tokens)


def test_bad_requests_are_refused_and_leave_the_model_usable():
    prefix, suffix = text(0, 3), text(1, 4)
    before = MODEL.infill(prefix, suffix, 3, max_steps=3, generator=generator(0)).tokens
    for arguments, match in (
        ({}, "length is None and max_length None"),
        ({"length": 3, "max_length": 3}, "length is 3 and max_length 3"),
        ({"length": 3, "min_length": 2}, "leave it out"),
        ({"length": 0}, "ask for at least 1"),
        ({"length": 3, "suffix_lengths": torch.tensor([0, 5, 1])}, r"suffix_lengths must lie in \[0, 4\]"),
    ):
        with pytest.raises(ValueError, match=match):
            MODEL.infill(prefix, suffix, **arguments)
    with pytest.raises(ValueError, match="prefix has 3 sequences, suffix 2"):
        MODEL.infill(prefix, suffix[:2], 3)
    with pytest.raises(ValueError, match="suffix: id 99"):
        MODEL.infill(prefix, torch.full((3, 2), 99), 3)
    with pytest.raises(TypeError, match=r"infill\(\) takes no lengths, warp"):
        MODEL.infill(prefix, suffix, 3, lengths=torch.tensor([1, 1, 1]), warp=2)
    assert torch.equal(MODEL.infill(prefix, suffix, 3, max_steps=3, generator=generator(0)).tokens, before)
