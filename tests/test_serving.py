"""Serving a batch: every sequence as if it were alone, with its own seed, stop tokens and lengths; the ended ones leave."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.core.cache import Cache
from evo.core.draws import Draws
from evo.heads import FixedTimestep, LinearDecoder, NearestNeighborDecoder, NucleusPrior
from evo.schedules import by_order, early_stop, late_start
from tests.conftest import generator, random_model
from tests.writing_cases import assert_survives_nan

MODEL = random_model()
V = MODEL.latent_space.vocab_size
ANY_SEED = st.integers(0, 10**6)
LEVELS = st.sampled_from([None, 0.0, 0.5, 1.0])


def head_of(level):
    return None if level is None else FixedTimestep(level)


@st.composite
def batches(draw):
    """Arguments of `generate` for each of several sequences, and those for all."""
    rows = [
        {
            "prompt": draw(st.lists(st.integers(0, V - 1), max_size=5)),
            "seed": draw(ANY_SEED),
            "most": (most := draw(st.integers(1, 9))),
            "fewest": draw(st.integers(0, most)),
            "stop": draw(st.sets(st.integers(0, V - 1), max_size=2)),
        }
        for _ in range(draw(st.integers(1, 4)))
    ]
    options = {
        "timestep_head": head_of(draw(LEVELS)),
        "window": draw(st.sampled_from([None, 1, 3])),
        "plan": draw(st.sampled_from([early_stop, late_start])),
        "decoder": draw(st.sampled_from([LinearDecoder(), NearestNeighborDecoder(), SAMPLED])),
        "max_steps": 3,
    }
    return rows, options


SAMPLED = LinearDecoder(prior=NucleusPrior(top_p=1.0, temperature=1.0))


def served(rows, options, model=MODEL):
    longest = max(len(row["prompt"]) for row in rows)
    prompt = torch.tensor([row["prompt"] + [0] * (longest - len(row["prompt"])) for row in rows], dtype=torch.int64)
    if options["window"] is None:
        # Of the whole answer, where answers differ, is a window of another width for each; the rest must not notice.
        options = {**options, "window": 9}
    return model.generate(
        prompt,
        [row["most"] for row in rows],
        min_new_tokens=[row["fewest"] for row in rows],
        lengths=torch.tensor([len(row["prompt"]) for row in rows]),
        stop=[sorted(row["stop"]) for row in rows],
        generator=[generator(row["seed"]) for row in rows],
        **options,
    )


@given(batch=batches(), order=st.randoms())
def test_a_sequence_is_written_as_if_it_were_alone(batch, order):
    rows, options = batch
    order.shuffle(rows)
    together = served(rows, options)
    for row, asked in enumerate(rows):
        alone = served([asked], options)
        length = alone.lengths[0]
        assert together.lengths[row] == length
        assert torch.equal(together.tokens[row, :length], alone.tokens[0, :length])
        # Not bit for bit: a matrix product of one row and one of three are not summed in the same order.
        torch.testing.assert_close(together.levels[row, :length], alone.levels[0, :length], rtol=0, atol=1e-10)


@given(batch=batches())
def test_sequences_end_where_they_were_told_to(batch):
    rows, options = batch
    out = served(rows, options)
    assert out.tokens.shape == (len(rows), max(row["most"] for row in rows))
    for asked, tokens, length in zip(rows, out.tokens.tolist(), out.lengths.tolist(), strict=True):
        assert max(1, asked["fewest"]) <= length <= asked["most"]
        assert not asked["stop"] & set(tokens[: length - 1])
        assert length == asked["most"] or tokens[length - 1] in asked["stop"]
        assert set(tokens[length:]) <= {min(asked["stop"], default=0)}


@given(seed=ANY_SEED, level=LEVELS, length=st.integers(1, 8), window=st.sampled_from([None, 2]))
def test_a_length_can_be_exact(seed, level, length, window):
    prompt = torch.randint(0, V, (3, 2), generator=generator(seed))
    out = MODEL.generate(
        prompt,
        length,
        min_new_tokens=length,
        stop=[1, 2, 3, 4],
        window=window,
        timestep_head=head_of(level),
        max_steps=3,
    )
    assert out.lengths.tolist() == [length] * 3


@pytest.mark.parametrize("level", [0.0, 0.6])
def test_in_float32_logits_of_a_batch_differ_by_rounding_only(level):
    model = random_model(dtype=torch.float32, vocab_size=300, width=64, latent_dim=32)
    with torch.no_grad():
        # Logits of a few nats, as a trained model's are: rounding is relative to them.
        model.readout.linear.weight.mul_(0.25)
    prompt = torch.randint(0, 300, (5, 6), generator=generator(0))
    seen = []

    def watching(logits, uniform):
        seen.append(logits)
        return NucleusPrior()(logits, uniform)

    options = {"prior": watching, "timestep_head": FixedTimestep(level), "max_steps": 3}
    model.generate(prompt, 8, generator=[generator(row) for row in range(5)], **options)
    together, seen = torch.stack(seen, 1), []
    for row in range(5):
        model.generate(prompt[row : row + 1], 8, generator=generator(row), **options)
        torch.testing.assert_close(torch.cat(seen), together[row], rtol=0, atol=1e-5)
        seen.clear()


@given(order=st.permutations(range(4)), level=LEVELS)
def test_in_another_order_a_batch_is_written_bit_for_bit(order, level):
    prompt = torch.randint(0, V, (4, 5), generator=generator(0))
    lengths = torch.tensor([5, 0, 2, 4])

    def write(rows):
        sources = [generator(row) for row in rows]
        return MODEL.generate(
            prompt[rows], 8, lengths=lengths[rows], timestep_head=head_of(level), max_steps=3, generator=sources
        )

    one, other = write([0, 1, 2, 3]), write(order)
    assert torch.equal(one.tokens[order], other.tokens)
    assert torch.equal(one.levels[order], other.levels)


def test_one_generator_gives_each_sequence_a_seed():
    prompt = torch.zeros(3, 2, dtype=torch.int64)
    together = MODEL.generate(prompt, 6, generator=generator(0), max_steps=3)
    alone = MODEL.generate(prompt[:1], 6, generator=generator(0), max_steps=3)
    assert torch.equal(together.tokens[:1], alone.tokens)
    assert len({tuple(row) for row in together.tokens.tolist()}) > 1


def test_without_a_generator_torchs_own_decides():
    prompt = torch.zeros(1, 2, dtype=torch.int64)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(MODEL.generate(prompt, 8, max_steps=3).tokens)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@given(seed=ANY_SEED, first=st.integers(1, 150), second=st.integers(1, 150))
def test_draws_are_a_positions_due_however_they_are_taken(seed, first, second):
    like = torch.zeros(3)
    whole = Draws.of([generator(seed), generator(seed + 1)], 2, like.device).take(first + second, like)
    draws = Draws.of([generator(seed), generator(seed + 1)], 2, like.device)
    begin = draws.take(first, like)
    draws.select([1])
    rest = draws.take(second, like)
    for all_at_once, parts in zip(whole, zip(begin, rest, strict=True), strict=True):
        assert torch.equal(all_at_once[:, :first], parts[0])
        assert torch.equal(all_at_once[1:, first:], parts[1])
    noise, uniform = whole
    assert noise.std() > 0.5
    assert (uniform >= 0).all()
    assert (uniform < 1).all()


@given(seed=ANY_SEED, level=LEVELS, every=st.integers(1, 4))
def test_those_that_have_ended_cost_nothing_more(seed, level, every):
    """No pass reads a sequence beyond the look at which its end is seen, nor in a window after its last."""
    rows = []
    forward = type(MODEL.backbone).forward

    def counting(self, latents, level, **given):
        rows.append((len(latents), given.get("packing")))
        return forward(self, latents, level, **given)

    prompt = torch.randint(0, V, (4, 3), generator=generator(seed))
    most = [1, 2, 6, 9]
    with mock.patch.object(type(MODEL.backbone), "forward", counting):
        chunks = MODEL.stream(
            prompt, most, timestep_head=head_of(level), window=3, every=every, max_steps=3, generator=generator(seed)
        )
        for chunk in chunks:
            assert chunk.position + len(chunk.tokens) <= most[chunk.row]
            assert chunk.last == (chunk.position + len(chunk.tokens) == most[chunk.row])
    read = [count for count, packing in rows if packing is None]
    assert read[0] == 4
    # By three new tokens two sequences have ended, by six three.
    assert read[-1] == 1
    assert sorted(read, reverse=True) == read
    if level == 0.0 and every == 1:
        assert read == [4, 3, 2, 2, 2, 2, 1, 1, 1]


@given(batch=batches())
def test_a_cache_stays_within_its_stated_size(batch):
    rows, options = batch
    made = []
    create = Cache.__init__

    def creating(self, *args, **kwargs):
        create(self, *args, **kwargs)
        made.append(self)

    with mock.patch.object(Cache, "__init__", creating):
        served(rows, options)
    stated = 1 + max(len(row["prompt"]) for row in rows) + max(row["most"] for row in rows)
    assert made
    for cache in made:
        assert cache.limit == cache.capacity == stated
        assert all(keys.shape[1] <= stated for keys, _ in cache._layers)


def test_a_plan_that_differs_from_sequence_to_sequence_keeps_to_its_own():
    """Also when those before it have left the batch."""
    prompt = torch.randint(0, V, (3, 3), generator=generator(0)).repeat(2, 1)
    order = torch.rand(6, 4, generator=generator(1))
    options = {"timestep_head": FixedTimestep(0.8), "window": 4, "max_steps": 6}
    together = MODEL.generate(
        prompt, [4, 4, 4, 8, 8, 8], plan=by_order(order, 0.5), generator=[generator(row) for row in range(6)], **options
    )
    for row in range(3, 6):
        plan = by_order(order[row : row + 1], 0.5)
        alone = MODEL.generate(prompt[row : row + 1], 8, plan=plan, generator=generator(row), **options)
        assert torch.equal(alone.tokens[0], together.tokens[row])


@pytest.mark.parametrize("decoder", [LinearDecoder(), NearestNeighborDecoder()])
def test_an_early_stop_is_refused_to_the_flow_too(decoder):
    prompt = torch.randint(0, V, (8, 2), generator=generator(0))
    options = {"timestep_head": FixedTimestep(1.0), "max_steps": 3, "decoder": decoder}
    free = MODEL.generate(prompt, 6, generator=generator(0), **options)
    stop = free.tokens[:, :5].flatten().bincount(minlength=V).topk(3).indices.tolist()
    held = MODEL.generate(prompt, 6, min_new_tokens=6, stop=stop, generator=generator(0), **options)
    assert torch.isin(free.tokens[:, :5], torch.tensor(stop)).any()
    assert not torch.isin(held.tokens[:, :5], torch.tensor(stop)).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": [3, -1]}, "max_new_tokens is -1"),
        ({"max_new_tokens": [3]}, r"max_new_tokens is \(3,\); a batch of 2"),
        ({"max_new_tokens": torch.tensor([[3, 3]])}, r"shape \(1, 2\)"),
        ({"max_new_tokens": torch.tensor([3.0, 3.0])}, "float32"),
        ({"max_new_tokens": 1000}, "do not fit the model's context"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"min_new_tokens": 4}, "min_new_tokens is 4 and max_new_tokens 3"),
        ({"min_new_tokens": 2, "stop": list(range(V))}, "every token of the vocabulary stops"),
        ({"stop": [V]}, r"ids in \[0, 7\)"),
        ({"stop": []}, "stop is empty"),
        ({"stop": [[1], [2], [3]]}, "3 sets; a batch of 2"),
        ({"stop": [[1], [-2]]}, r"ids in \[0, 7\)"),
        ({"generator": [generator()]}, "generator has 1 of them; 2 sequences"),
        ({"window": 0}, "window is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"lengths": torch.tensor([5, 1])}, "lengths must lie in"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_what_cannot_be_served_is_refused_at_once(wrong, message, method):
    asked = {"max_new_tokens": 3, **wrong}
    with pytest.raises(ValueError, match=message):
        getattr(MODEL, method)(torch.zeros(2, 4, dtype=torch.int64), **asked)


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("window", [None, 2])
def test_nan_weights_met_while_decoding_leave_the_model_usable(level, window):
    """One entry's embedding is NaN: a network that has not met it says nothing wrong until its logit is looked at."""
    model = random_model().train()
    prompt = torch.zeros(2, 3, dtype=torch.int64)
    options = {"timestep_head": FixedTimestep(level), "window": window, "max_steps": 2}
    assert_survives_nan(
        model, lambda: model.generate(prompt, 5, generator=generator(0), **options).tokens, "NaN or infinite"
    )
