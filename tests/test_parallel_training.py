"""Training for the parallel sketch: sequences of which everything behind some place is sketched while nothing of it is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo import Evo
from evo.core import Objective, Speculation
from evo.core.bound import Sketch, Waiting
from evo.core.contract import as_batch
from evo.core.documents import Documents
from evo.core.levels import Exploration
from evo.core.part import Part
from evo.heads import FixedTimestep
from tests.conftest import generator, random_model

MODEL = random_model()
DETACHED = random_model(bos="detached")
V = MODEL.latent_space.vocab_size
ANY_SEED = st.integers(0, 10**6)
SHAPE = {"prompt_length": [0, 2, 0, 3], "lengths": [8, 8, 5, 6]}


def batch_of(seed, **shape):
    """Four sequences of at most eight tokens, with prompts and padding unless told otherwise."""
    tokens = torch.randint(0, V, (4, 8), generator=generator(seed))
    return as_batch(MODEL, tokens, **{name: torch.tensor(value) for name, value in {**SHAPE, **shape}.items()})


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


@settings(max_examples=10)
@given(seed=ANY_SEED, place=st.integers(0, 8))
def test_what_is_said_of_a_waiting_token_is_what_generation_would_say(seed, place):
    """Known tokens at their levels, all others noise at level 1 that is not the tokens' own."""
    batch = batch_of(seed, prompt_length=[0] * 4, lengths=[8] * 4)
    levels = torch.rand(4, 8, dtype=torch.float64, generator=generator(seed))
    noise, fresh = normal(seed, 4, 8, 8), normal(seed + 1, 4, 8, 8)
    known = torch.full((4,), place)
    sketch = Sketch(MODEL, batch, levels, noise, Waiting(known=known, noise=fresh))
    seen, level = sketch.latents.clone(), sketch.levels.clone()
    seen[:, place:], level[:, place:] = fresh[:, place:], 1.0
    assert torch.equal(sketch.hidden, MODEL.sketch(seen, level, known=known))
    plain = Sketch(MODEL, batch, levels, noise)
    assert torch.equal(sketch.latents, plain.latents)
    upto = min(place + 1, 8)
    torch.testing.assert_close(sketch.bits()[0][:, :upto], plain.bits()[0][:, :upto], rtol=0, atol=1e-10)


@given(seed=ANY_SEED, suffix=st.sampled_from([None, [2, 0, 1, 2]]))
def test_prompt_suffix_and_padding_never_wait(seed, suffix):
    batch = batch_of(seed, suffix_length=suffix or [0] * 4)
    levels, noise = torch.full((4, 8), 0.5, dtype=torch.float64), normal(seed, 4, 8, 8)
    none = Waiting(known=batch.prompt + batch.free.sum(1), noise=normal(seed + 1, 4, 8, 8))
    plain, sketch = (Sketch(MODEL, batch, levels, noise, waiting).bits()[0] for waiting in (None, none))
    torch.testing.assert_close(sketch[batch.coded], plain[batch.coded], rtol=0, atol=1e-10)


@given(seed=ANY_SEED, first=st.integers(1, 7), known=st.integers(0, 8), model=st.sampled_from([MODEL, DETACHED]))
def test_documents_of_a_sequence_wait_as_if_they_were_alone(seed, first, known, model):
    latents, fresh = normal(seed, 1, 8, 8), normal(seed + 1, 1, 8, 8)
    waits = torch.arange(8) >= known
    seen = torch.where(waits[:, None], fresh, latents)
    level = torch.where(waits, 1.0, torch.zeros(1, 8, dtype=torch.float64))
    documents = Documents.of((torch.arange(8) >= first).long()[None], model.bos_slots)
    together = model.sketch(seen, level, known=torch.tensor([known]), documents=documents)
    for here in (slice(0, first), slice(first, 8)):
        count = torch.tensor([min(max(known, here.start), here.stop) - here.start])
        alone = model.sketch(seen[:, here], level[:, here], known=count)
        torch.testing.assert_close(together[:, here], alone, rtol=0, atol=1e-10)


@given(seed=ANY_SEED)
def test_with_a_suffix_a_waiting_token_sees_it(seed):
    tokens = torch.randint(0, V, (2, 8), generator=generator(seed))
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % V
    noise, levels = normal(seed, 2, 8, 8), torch.zeros(2, 8, dtype=torch.float64)
    waiting = Waiting(known=torch.tensor([2, 8]), noise=normal(seed + 1, 2, 8, 8))
    said = []
    for each in (tokens, other):
        batch = as_batch(MODEL, each, torch.tensor([1, 1]), None, suffix_length=torch.tensor([2, 2]))
        said.append(Sketch(MODEL, batch, levels, noise, waiting).context_logits)
    assert (said[0][:, 1:6] != said[1][:, 1:6]).any(-1).all()
    assert torch.equal(said[0][:, :1], said[1][:, :1])


def test_the_sum_stays_a_bound_because_the_noise_is_not_the_tokens_own():
    """One token, known beforehand: it costs nothing to say. Who may look at its noise says it for less than nothing."""
    model = random_model(vocab_size=3)
    schedule, embeddings = model.schedule, model.latent_space.weight.detach()
    level = torch.tensor(0.5, dtype=torch.float64)
    noise, fresh = normal(0, 4000, 8), normal(1, 4000, 8)
    signal, spread = schedule.signal(level), schedule.noise(level)
    latents = signal * embeddings[0] + spread * noise

    def nats(seen):
        """KL of q(z|x) from a prior that picks, having seen noise, the entry that with it comes nearest to what it takes z for."""
        guess = signal * embeddings[0] + spread * seen
        picked = (guess @ embeddings.T * signal - signal**2 * embeddings.square().sum(1) / 2).argmax(1)
        gain = (latents - signal * embeddings[picked]).square().sum(1) - (
            latents - signal * embeddings[0]
        ).square().sum(1)
        return (gain / (2 * spread**2)).mean()

    assert nats(noise) < 0
    assert nats(fresh) > 0


@settings(max_examples=10)
@given(
    seed=ANY_SEED,
    cut=st.integers(1, 5),
    share=st.sampled_from([0.3, 0.5, 1.0]),
    causal=st.sampled_from([0.0, 1.0]),
)
def test_the_parts_of_a_batch_add_up(seed, cut, share, causal):
    model = random_model().train()
    tokens = torch.randint(0, V, (6, 8), generator=generator(seed))
    objective = Objective(parallel=share, causal_weight=causal, exploration=Exploration(share=0.5))

    def losses(*parts):
        found = []
        for rows in parts:
            part = Part(rows=rows, total=6, scored=48, common=generator(seed + 7))
            sources = [generator(seed + row) for row in rows]
            found.append(model(tokens[list(rows)], objective=objective, generator=sources, part=part))
        return found

    (whole,) = losses(range(6))
    first, second = losses(range(cut), range(cut, 6))
    torch.testing.assert_close(first.loss + second.loss, whole.loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat([first.bound, second.bound]), whole.bound, rtol=0, atol=1e-10)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="parallel is"):
        Objective(parallel=share)


def test_without_a_share_nothing_is_drawn_and_nothing_changes():
    model = random_model().train()
    tokens = torch.randint(0, V, (6, 8), generator=generator(0))
    plain, none, some = (
        model(tokens, objective=replace(Objective(), parallel=share), generator=generator(0))
        for share in (0.0, 0.0, 0.5)
    )
    assert torch.equal(plain.loss, none.loss)
    assert not torch.equal(plain.loss, some.loss)


def test_a_trained_model_writes_several_tokens_in_a_pass():
    """Counting on from any number: what waits must be told by how far it is from what is known."""
    torch.manual_seed(0)
    model = Evo.from_preset("tiny", vocab_size=12, width=32, depth=2, heads=2, context=16, dropout=0.0).train()
    objective = Objective(parallel=1.0, label_smoothing=0.0, entropy_weight=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    source = generator(0)
    for _ in range(300):
        tokens = (torch.randint(0, 12, (32, 1), generator=source) + torch.arange(10)) % 12
        optimizer.zero_grad()
        model(tokens, levels=0.0, objective=objective, generator=source).loss.backward()
        optimizer.step()
    prompt = torch.arange(12)[:, None]
    expected = (prompt + 1 + torch.arange(8)) % 12
    options = {"temperature": 0, "generator": source}
    # Chance is 1/12.
    for stride in (1, 4, 8):
        out = model.generate(prompt, 8, stride=stride, timestep_head=FixedTimestep(0), **options)
        assert (out.tokens == expected).double().mean() > 0.8, stride
    out = model.generate(prompt, 8, speculation=Speculation(causal=True), **options)
    assert torch.equal(out.tokens, model.generate(prompt, 8, timestep_head=FixedTimestep(0), **options).tokens)
    assert sum(map(sum, out.accepted)) / sum(map(len, out.accepted)) > 2, "guesses a round"
