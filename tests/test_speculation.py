"""Lossless speculation: the text of plain generation at level 0, in fewer passes."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from evo.core import Cache, Speculation
from evo.heads import FixedTimestep, NucleusPrior
from tests.conftest import generator, random_model
from tests.writing_cases import assert_freed, assert_survives_nan

MODEL = random_model()
SELF_CONDITIONED = random_model(self_conditioning=True)
DETACHED = random_model(bos="detached")
V = MODEL.latent_space.vocab_size
ANY_SEED = st.integers(0, 10**6)
WAYS = st.one_of(
    st.builds(Speculation, run=st.integers(1, 9), steps=st.integers(1, 3)),
    st.builds(Speculation, run=st.integers(1, 9), causal=st.just(True)),
)


def prompt_of(seed, batch=3, length=4):
    return torch.randint(0, V, (batch, length), generator=generator(seed))


def agreeing():
    """A model that says the same of every token, whatever it sees: of such, every guess is right."""
    model = random_model()
    with torch.no_grad():
        model.readout.linear.weight.zero_()
        model.readout.bias.copy_(torch.arange(V) / 2)
    return model


def passes(model, write):
    """What `write` returns, and the tokens of a sequence in each pass of the network that it makes."""
    made = []
    forward = type(model.backbone).forward

    def counting(self, latents, level, **given):
        made.append(latents.shape[1])
        return forward(self, latents, level, **given)

    with mock.patch.object(type(model.backbone), "forward", counting):
        return write(), made


@given(
    seed=ANY_SEED,
    how=WAYS,
    model=st.sampled_from([MODEL, SELF_CONDITIONED, DETACHED]),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([0.5, 1.0]),
    lengths=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    most=st.lists(st.integers(2, 16), min_size=3, max_size=3),
    fewest=st.integers(0, 2),
    stop=st.sampled_from([None, [2], [1, 5]]),
)
def test_the_text_is_that_of_plain_generation(seed, how, model, temperature, top_p, lengths, most, fewest, stop):
    options = {"temperature": temperature, "top_p": top_p, "min_new_tokens": fewest, "stop": stop}
    options["lengths"] = torch.tensor(lengths)
    plain, quick = (
        model.generate(prompt_of(seed), most, generator=generator(seed), **options, **way)
        for way in ({"timestep_head": FixedTimestep(0)}, {"speculation": how})
    )
    assert torch.equal(plain.tokens, quick.tokens)
    assert torch.equal(plain.lengths, quick.lengths)
    assert not quick.levels.any()
    assert quick.nfe == 0
    assert plain.accepted is None


def test_a_prior_of_ones_own_needs_nothing_else():
    def least(logits, uniform):
        return torch.where(uniform < 0.5, logits.argmin(-1), logits.argmax(-1))

    plain, quick = (
        MODEL.generate(prompt_of(0), 12, prior=least, generator=generator(0), **way)
        for way in ({"timestep_head": FixedTimestep(0)}, {"speculation": Speculation()})
    )
    assert torch.equal(plain.tokens, quick.tokens)


@pytest.mark.parametrize("how", [Speculation(run=3), Speculation(run=3, steps=2), Speculation(run=3, causal=True)])
def test_tokens_are_distributed_as_the_causal_half_says(how):
    """Against the exact distribution of three tokens, at a level of significance of 1e-6."""
    model, prior, count = random_model(vocab_size=4, width=16), NucleusPrior(top_p=0.95, temperature=1.3), 2500
    prompt = torch.tensor([[1, 2]])
    texts = torch.tensor(list(itertools.product(range(4), repeat=3)))
    with torch.no_grad():
        logits = model.context_logits(torch.cat([prompt.expand(64, -1), texts], 1))[:, 2:]
        expected = prior.log_probs(logits).gather(-1, texts[..., None]).sum((1, 2)).exp()
    torch.testing.assert_close(expected.sum(), torch.ones((), dtype=torch.float64))
    found = model.generate(prompt.expand(count, -1), 3, prior=prior, speculation=how, generator=generator(0))
    assert found.accepted is not None
    assert sum(map(sum, found.accepted)) > count / 20, "otherwise nothing has been tested"
    seen = (found.tokens @ torch.tensor([16, 4, 1])).bincount(minlength=64)
    assert not seen[expected == 0].any()
    possible = expected > 0
    deviation = ((seen - count * expected) ** 2 / (count * expected))[possible].sum()
    assert deviation < chi2.isf(1e-6, int(possible.sum()) - 1)


@pytest.mark.parametrize("how", [Speculation(run=4), Speculation(run=4, causal=True)])
def test_where_the_halves_agree_every_guess_is_right(how):
    model = agreeing()
    out, made = passes(model, lambda: model.generate(prompt_of(0), 21, temperature=0, speculation=how))
    # Three rounds of 1 + 4 + 1 tokens, and one of the three that are left.
    assert out.accepted == ((4, 4, 4, 1),) * 3
    assert made == [5, *(5, 5), *(6, 5), *(6, 5), *(3, 2)]


@given(seed=ANY_SEED, how=WAYS, new=st.integers(1, 14))
def test_a_round_is_so_many_passes_and_at_least_two_tokens(seed, how, new):
    out, made = passes(MODEL, lambda: MODEL.generate(prompt_of(seed), new, speculation=how, generator=generator(seed)))
    assert out.accepted is not None
    rounds = max(map(len, out.accepted))
    # A round that has room for one token guesses nothing.
    assert 2 * rounds + 1 <= len(made) <= (how.steps + 1) * rounds + 1
    for accepted in out.accepted:
        assert new <= sum(accepted) + 2 * len(accepted) <= new + 2
        assert max(accepted) <= how.run
    assert max(made) <= max(5, how.run + 2)


@settings(max_examples=10)
@given(seed=ANY_SEED, how=WAYS)
def test_the_run_follows_what_was_accepted(seed, how):
    out, made = passes(
        MODEL, lambda: MODEL.generate(prompt_of(seed, batch=1), 30, speculation=how, generator=generator(seed))
    )
    assert out.accepted is not None
    checks = made[how.steps + 1 :: how.steps + 1]
    hope, left = how.run, 30
    for accepted, read in zip(out.accepted[0], checks, strict=False):
        assert read == max(0, min(hope, left - 2)) + 1
        hope, left = min(how.run, 2 * accepted + 2), left - accepted - 2


@settings(max_examples=6)
@given(seed=ANY_SEED, how=WAYS, order=st.permutations(range(3)))
def test_a_sequence_is_written_as_if_it_were_alone(seed, how, order):
    prompt, lengths = prompt_of(seed, 3, 5), torch.tensor([5, 0, 2])
    most = [9, 3, 12]

    def write(rows):
        return MODEL.generate(
            prompt[rows],
            [most[row] for row in rows],
            lengths=lengths[rows],
            speculation=how,
            generator=[generator(seed + row) for row in rows],
        )

    together = write(order)
    for place, row in enumerate(order):
        alone = write([row])
        assert torch.equal(alone.tokens[0], together.tokens[place, : most[row]])


@settings(max_examples=6)
@given(seed=ANY_SEED, how=WAYS)
def test_the_cache_stays_within_its_stated_size_and_keeps_what_was_written(seed, how):
    lengths, made = torch.tensor([4, 1, 3]), []
    create = Cache.__init__

    def creating(self, *args, **kwargs):
        create(self, *args, **kwargs)
        made.append(self)

    options = {"lengths": lengths, "speculation": how}
    text = MODEL.generate(prompt_of(seed), 12, generator=generator(seed), **options).tokens
    expected = []
    for row, length in enumerate(lengths.tolist()):
        read = torch.cat([prompt_of(seed)[row, :length], text[row]])[None]
        expected.append(Cache(20))
        latents, level = MODEL.behind_bos(MODEL.latent_space.weight[read], torch.zeros(read.shape, dtype=torch.float64))
        with torch.no_grad():
            MODEL.backbone(latents, level, cache=expected[-1], store=True)
    with mock.patch.object(Cache, "__init__", creating):
        chunks = MODEL.stream(prompt_of(seed), 12, generator=generator(seed), **options)
        first = next(chunks)
        (cache,) = made
        assert cache.limit == cache.capacity == 1 + 4 + 12
        written = [0, 0, 0]
        for chunk in itertools.chain([first], chunks):
            assert cache.length <= 1 + 4 + 12
            if chunk.row == 0:
                # A round is over: all but the token written last has been read, and nothing that was rejected is left.
                ends = torch.as_tensor(cache.lengths).expand(3).tolist()
                assert ends[0] == 1 + 4 + chunk.position + len(chunk.tokens) - 1 or chunk.last
                assert all(end > 1 + length + done for end, length, done in zip(ends, lengths, written, strict=True))
                for layer, row in itertools.product(range(2), range(3)):
                    for kept, known in zip(cache.read(layer), expected[row].read(layer), strict=True):
                        end = min(ends[row], known.shape[2])
                        torch.testing.assert_close(kept[row, :, :end], known[0, :, :end], rtol=0, atol=1e-12)
            written[chunk.row] += len(chunk.tokens)
            if chunk.last:
                break


@settings(max_examples=10)
@given(seed=ANY_SEED, how=WAYS, stop=st.sampled_from([None, [2, 3]]))
def test_a_stream_hands_out_round_by_round_what_generate_writes(seed, how, stop):
    options = {"speculation": how, "stop": stop, "lengths": torch.tensor([4, 1, 0])}
    whole = MODEL.generate(prompt_of(seed), 11, generator=generator(seed), **options)
    texts, ended = [[], [], []], set()
    for chunk in MODEL.stream(prompt_of(seed), 11, generator=generator(seed), **options):
        assert chunk.row not in ended
        assert chunk.position == len(texts[chunk.row])
        texts[chunk.row] += chunk.tokens
        if chunk.last:
            ended.add(chunk.row)
    assert ended == {0, 1, 2}
    assert [len(text) for text in texts] == whole.lengths.tolist()
    assert all(row[: len(text)] == text for text, row in zip(texts, whole.tokens.tolist(), strict=True))


def test_letting_go_of_a_stream_frees_its_cache():
    assert_freed(lambda: MODEL.stream(prompt_of(0), 20, speculation=Speculation(), generator=generator(0)))


@pytest.mark.parametrize("how", [Speculation(), Speculation(steps=2), Speculation(causal=True)])
def test_nan_weights_fail_and_leave_the_model_usable(how):
    model = random_model()
    assert_survives_nan(
        model,
        lambda: model.generate(prompt_of(0), 8, generator=generator(0), speculation=how).tokens,
        "NaN or infinite logits while speculating",
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"run": 0}, "run is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2, "causal": True}, "steps is 2 and causal is True"),
    ],
)
def test_a_speculation_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Speculation(**wrong)


@pytest.mark.parametrize(("wrong", "message"), [({"run": 2.5}, "run is 2.5"), ({"steps": True}, "steps is True")])
def test_a_speculation_counts_in_whole_numbers(wrong, message):
    with pytest.raises(TypeError, match=message):
        Speculation(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stride": 2}, "stride is 2, and speculation"),
        ({"timestep_head": FixedTimestep(0.5)}, "speculation writes at level 0"),
        ({"timestep_head": MODEL.timestep_head}, "speculation writes at level 0"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_what_contradicts_speculation_is_refused(wrong, message, method):
    with pytest.raises(ValueError, match=message):
        getattr(MODEL, method)(prompt_of(0), 6, speculation=Speculation(), **wrong)
