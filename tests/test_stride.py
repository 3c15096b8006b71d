"""The parallel sketch: several places in one pass, those not yet sketched as noise."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo.core import Cache, Objective, Speculation
from evo.core.draws import Draws
from evo.heads import FixedTimestep, NucleusPrior
from evo.schedules import LinearVP, VarianceExploding, early_stop, late_start, step_counts
from tests.conftest import generator, random_model
from tests.writing_cases import assert_freed, assert_survives_nan

MODEL = random_model()
DETACHED = random_model(bos="detached")
V = MODEL.latent_space.vocab_size
ANY_SEED = st.integers(0, 10**6)
LEVELS = st.sampled_from([None, 0.0, 0.5, 1.0])


def head_of(level):
    return None if level is None else FixedTimestep(level)


def prompt_of(seed, batch=3, length=4):
    return torch.randint(0, V, (batch, length), generator=generator(seed))


class Watched(NucleusPrior):
    """A prior that keeps the logits of each call, (T, V)."""

    def __init__(self, **options):
        super().__init__(**options)
        object.__setattr__(self, "seen", [])

    def __call__(self, logits, uniform):
        self.seen.append(logits)
        return super().__call__(logits, uniform)


@torch.no_grad()
def uncached(model, prompt, stride, new, head, prior, seed, max_steps):
    """The sketch of one window behind prompts (B, P), by `model.sketch` over everything in every pass: logits, tokens and latents."""
    batch, before = prompt.shape
    embeddings, schedule = model.latent_space.weight, model.schedule
    draws = Draws.of(generator(seed), batch, prompt.device)
    waiting = draws.apart().take(new, embeddings)[0]
    noise, uniform = draws.take(new, embeddings)
    latents, level = embeddings[prompt], torch.zeros(prompt.shape, dtype=torch.float64)
    logits, tokens = [], []
    for start in range(0, new, stride):
        run = slice(start, min(start + stride, new))
        hidden = model.sketch(
            torch.cat([latents, waiting[:, run]], 1),
            torch.cat([level, torch.ones_like(uniform[:, run, 0])], 1),
            known=torch.full((batch,), before + start),
        )[:, before + start :]
        said = model.readout(hidden, embeddings)
        drawn = prior(said.flatten(0, 1), uniform[:, run, 0].flatten()).view(batch, -1)
        chosen = head(hidden, said)
        chosen = torch.where((step_counts(chosen, max_steps) > 0) & (chosen > schedule.t_min), chosen, 0.0)
        clean = embeddings[drawn]
        noised = torch.where((chosen > 0)[..., None], schedule.noised(clean, noise[:, run], chosen), clean)
        latents, level = torch.cat([latents, noised], 1), torch.cat([level, chosen], 1)
        logits.append(said)
        tokens.append(drawn)
    return torch.cat(logits, 1), torch.cat(tokens, 1), level[:, before:]


@given(
    seed=ANY_SEED,
    stride=st.integers(2, 7),
    level=st.sampled_from([None, 0.0, 0.5]),
    model=st.sampled_from([MODEL, DETACHED]),
    length=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_the_sketch_is_that_without_a_cache(seed, stride, level, model, length, temperature):
    """Nothing of a waiting place is kept: what comes behind a run is said as if it had never been there."""
    head = model.timestep_head if level is None else FixedTimestep(level)
    prompt, prior = prompt_of(seed, 2, length), Watched(temperature=temperature)
    out = model.generate(
        prompt, 7, stride=stride, timestep_head=head, prior=prior, max_steps=4, generator=generator(seed)
    )
    found = torch.cat([logits.view(2, -1, V) for logits in prior.seen], 1)
    logits, tokens, levels = uncached(
        model, prompt, stride, 7, head, NucleusPrior(temperature=temperature), seed, max_steps=4
    )
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.levels, levels, rtol=0, atol=1e-10)
    if level == 0.0:
        assert torch.equal(out.tokens, tokens)
        assert out.nfe == 0


@given(seed=ANY_SEED, known=st.integers(0, 6), bos=st.sampled_from(["attended", "detached"]))
def test_a_parallel_sketch_speaks_from_what_is_known_and_from_its_own_noise(seed, known, bos):
    model = MODEL if bos == "attended" else DETACHED
    draws = generator(seed)
    latents = torch.randn(1, 7, 8, dtype=torch.float64, generator=draws)
    level = torch.rand(1, 7, dtype=torch.float64, generator=draws)
    level[:, known:] = 0.9  # of a latent at level 1 nobody would see anything
    with torch.no_grad():
        plain = model.sketch(latents, level)
        hidden = model.sketch(latents, level, known=torch.tensor([known]))
    torch.testing.assert_close(hidden[:, : known + 1], plain[:, : known + 1], rtol=0, atol=1e-12)
    for place in range(7):
        other = latents.clone()
        other[:, place] += 1
        with torch.no_grad():
            moved = (model.sketch(other, level, known=torch.tensor([known])) != hidden).any(-1)[0]
        # A known token is seen by all behind it, a waiting one by itself too; the first of these is not asked.
        expected = torch.arange(7) > place if place <= known else torch.arange(7) >= place
        assert torch.equal(moved, expected)


@given(seed=ANY_SEED)
def test_sequences_with_nothing_waiting_are_sketched_as_ever(seed):
    latents = torch.randn(2, 6, 8, dtype=torch.float64, generator=generator(seed))
    level = torch.full((2, 6), 0.5, dtype=torch.float64)
    with torch.no_grad():
        plain = MODEL.sketch(latents, level)
        both = MODEL.sketch(latents, level, known=torch.tensor([6, 2]))
    torch.testing.assert_close(both[0], plain[0], rtol=0, atol=1e-12)
    assert not torch.allclose(both[1], plain[1])


@given(seed=ANY_SEED, stride=st.integers(1, 6), plan=st.sampled_from([early_stop, late_start]))
def test_at_level_1_it_is_pure_diffusion_at_any_stride(seed, stride, plan):
    """The sketch reads nothing, and what refinement starts from is noise that knows of no token."""
    starts, read = [], []
    hidden_states = type(MODEL).hidden_states

    def watching(self, latents, level, **given):
        (starts if "packing" in given else read).append(latents)
        return hidden_states(self, latents, level, **given)

    options = {"timestep_head": FixedTimestep(1.0), "plan": plan, "max_steps": 3}
    plain = MODEL.generate(prompt_of(seed), 6, generator=generator(seed), **options)
    with mock.patch.object(type(MODEL), "hidden_states", watching):
        out = MODEL.generate(prompt_of(seed), 6, stride=stride, temperature=1.0, generator=generator(seed), **options)
    assert torch.equal(out.tokens, plain.tokens)
    assert out.nfe == plain.nfe == 3
    assert [latents.shape[:2] for latents in read] == [(3, 5)]
    noise, _ = Draws.of(generator(seed), 3, torch.device("cpu")).take(6, MODEL.latent_space.weight)
    assert torch.equal(starts[0].view(3, 6, -1), noise)


@pytest.mark.parametrize("option", [{"stride": 3}, {"speculation": Speculation(run=2)}], ids=str)
def test_a_waiting_place_is_as_loud_as_the_schedule_is_at_level_1(option):
    """In generation and in training: what the window, or the flow that guesses, knows of level 1 holds there too."""
    model, seen = random_model(), []
    model.schedule = VarianceExploding(sigma_max=50.0)
    hidden_states = type(model).hidden_states

    def watching(self, latents, level, **given):
        seen.append(latents[level == 1])
        return hidden_states(self, latents, level, **given)

    with mock.patch.object(type(model), "hidden_states", watching):
        model.generate(prompt_of(0), 6, timestep_head=FixedTimestep(0.0), generator=generator(0), **option)
        written = torch.cat(seen)
        seen.clear()
        model.train()(prompt_of(0), levels=0.0, objective=Objective(parallel=1.0), generator=generator(0))
        trained = torch.cat(seen)
    for latents in (written, trained):
        assert latents.numel() > 40
        assert 30 < latents.std() < 70


def test_where_the_schedule_ends_short_of_noise_level_1_is_sketched():
    model = random_model()
    model.schedule = LinearVP(beta_max=4.0)
    options = {"timestep_head": FixedTimestep(1.0), "max_steps": 3}
    prior = Watched()
    model.generate(prompt_of(0), 6, prior=prior, generator=generator(0), **options)
    assert len(prior.seen) == 6


@given(seed=ANY_SEED, stride=st.integers(1, 6), level=st.sampled_from([0.35, 0.8]))
def test_every_token_takes_its_steps(seed, stride, level):
    out = MODEL.generate(
        prompt_of(seed), 6, stride=stride, timestep_head=FixedTimestep(level), max_steps=6, trajectory=True
    )
    (steps,) = out.trajectory
    assert ((steps.levels[:, 1:] != steps.levels[:, :-1]).sum(1) == int(6 * level + 1e-6)).all()


@pytest.mark.parametrize(("stride", "passes"), [(1, 12), (2, 6), (3, 4), (5, 3), (12, 1)])
def test_a_pass_sketches_so_many_tokens(stride, passes):
    made = []
    forward = type(MODEL.backbone).forward

    def counting(self, latents, level, **given):
        made.append(latents.shape[1])
        return forward(self, latents, level, **given)

    with mock.patch.object(type(MODEL.backbone), "forward", counting):
        MODEL.generate(prompt_of(0), 12, stride=stride, timestep_head=FixedTimestep(0), generator=generator(0))
    # The prompt's own pass speaks of the first token; places that wait need one of their own.
    assert len(made) == passes + (stride > 1)
    assert max(made[1:], default=0) <= 2 * stride


@settings(max_examples=10)
@given(
    seed=ANY_SEED,
    stride=st.integers(2, 4),
    level=LEVELS,
    window=st.sampled_from([4, 9]),
    order=st.permutations(range(3)),
)
def test_a_sequence_is_written_as_if_it_were_alone(seed, stride, level, window, order):
    prompt, lengths, most = prompt_of(seed), torch.tensor([4, 0, 2]), [9, 2, 6]
    made = []
    create = Cache.__init__

    def creating(self, *args, **kwargs):
        create(self, *args, **kwargs)
        made.append(self)

    def write(rows):
        return MODEL.generate(
            prompt[rows],
            [most[row] for row in rows],
            lengths=lengths[rows],
            stride=stride,
            window=window,
            stop=3,
            min_new_tokens=2,
            timestep_head=head_of(level),
            max_steps=3,
            generator=[generator(seed + row) for row in rows],
        )

    with mock.patch.object(Cache, "__init__", creating):
        together = write(order)
    assert all(cache.capacity == cache.limit == 1 + 4 + 9 for cache in made)
    for place, row in enumerate(order):
        alone = write([row])
        length = alone.lengths[0]
        assert together.lengths[place] == length
        assert torch.equal(alone.tokens[0, :length], together.tokens[place, :length])


@settings(max_examples=10)
@given(
    seed=ANY_SEED, stride=st.integers(2, 5), level=LEVELS, every=st.integers(1, 6), stop=st.sampled_from([None, [2]])
)
def test_the_chunks_of_a_stream_are_what_generate_writes(seed, stride, level, every, stop):
    options = {"stride": stride, "timestep_head": head_of(level), "window": 5, "stop": stop, "max_steps": 3}
    whole = MODEL.generate(prompt_of(seed), 9, generator=generator(seed), **options)
    texts = [[], [], []]
    for chunk in MODEL.stream(prompt_of(seed), 9, generator=generator(seed), every=every, **options):
        assert chunk.position == len(texts[chunk.row])
        texts[chunk.row] += chunk.tokens
    assert [len(text) for text in texts] == whole.lengths.tolist()
    assert all(row[: len(text)] == text for text, row in zip(texts, whole.tokens.tolist(), strict=True))


def test_the_noise_of_waiting_places_is_not_that_of_their_tokens():
    draws = Draws.of([generator(0), generator(1)], 2, torch.device("cpu"))
    apart = draws.apart()
    like = torch.zeros(4, dtype=torch.float64)
    own, waiting = draws.take(2000, like)[0], apart.take(2000, like)[0]
    assert (own * waiting).mean().abs() < 0.05
    assert (waiting[0] * waiting[1]).mean().abs() < 0.05
    again = Draws.of([generator(0), generator(1)], 2, torch.device("cpu"))
    assert torch.equal(again.apart().take(2000, like)[0], waiting)
    assert torch.equal(again.take(2000, like)[0], own)


def test_letting_go_of_a_stream_frees_its_cache():
    options = {"stride": 4, "timestep_head": FixedTimestep(0)}
    assert_freed(lambda: MODEL.stream(prompt_of(0), 20, **options, generator=generator(0)))


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_nan_weights_fail_and_leave_the_model_usable(level):
    model = random_model()
    options = {"stride": 3, "timestep_head": FixedTimestep(level), "max_steps": 2}
    assert_survives_nan(
        model, lambda: model.generate(prompt_of(0), 6, generator=generator(0), **options).tokens, "NaN or infinite"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stride": 0}, "stride is 0"),
        ({"stride": -2}, "stride is -2"),
        ({"stride": 7, "window": 6}, "stride is 7 and the window has 6 tokens"),
        ({"stride": 3, "window": 2}, "stride is 3 and the window has 2 tokens"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_stride_that_cannot_be_is_refused(wrong, message, method):
    with pytest.raises(ValueError, match=message):
        getattr(MODEL, method)(prompt_of(0), 6, **wrong)


@settings(max_examples=10)
@given(seed=ANY_SEED, short=st.integers(1, 4), stride=st.integers(2, 6), level=LEVELS)
def test_an_answer_shorter_than_the_stride_is_what_it_is_beside_a_longer_one(seed, short, stride, level):
    prompt, options = prompt_of(seed)[:2], {"stride": stride, "timestep_head": head_of(level), "max_steps": 3}
    both = MODEL.generate(prompt, [short, 8], generator=[generator(seed), generator(1)], **options)
    alone = MODEL.generate(prompt[:1], short, generator=[generator(seed)], **options)
    assert torch.equal(alone.tokens[0], both.tokens[0, :short])
