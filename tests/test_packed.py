"""Documents that share a sequence: each has what it has alone, and none knows of another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo import evaluate
from evo.core.bound import Batch, Sketch, learned_levels
from evo.core.contract import as_batch
from evo.core.documents import Documents
from evo.core.masks import Causal
from evo.data.packing import Packed
from tests.conftest import generator, random_model

VOCABULARY, DIM = 7, 8
MODELS = {
    "attended": random_model(1),
    "detached": random_model(2, bos="detached"),
    "self-conditioned": random_model(3, self_conditioning=True),
    "learned positions": random_model(4, rotary=None),
}
EXACT = {"rtol": 1e-10, "atol": 1e-10}

models = st.sampled_from(sorted(MODELS)).map(MODELS.__getitem__)
rows_of_lengths = st.integers(1, 14).flatmap(
    lambda size: st.lists(
        st.sets(st.integers(1, size)).map(lambda cuts: [*sorted(cuts - {size}), size]), min_size=1, max_size=3
    )
)


def spans(edges):
    """(start, stop) of each document of a row, from where they end."""
    return list(zip([0, *edges[:-1]], edges, strict=True))


def ids(rows):
    """(B, N) document ids."""
    return torch.stack([torch.bucketize(torch.arange(edges[-1]), torch.tensor(edges), right=True) for edges in rows])


def draw(rows, seed):
    """Tokens (B, N), latents (B, N, D), levels (B, N) with some zeros."""
    g, shape = generator(seed), (len(rows), rows[0][-1])
    tokens = torch.randint(VOCABULARY, shape, generator=g)
    latents = torch.randn(*shape, DIM, generator=g, dtype=torch.float64)
    levels = torch.rand(shape, generator=g, dtype=torch.float64)
    return tokens, latents, torch.where(torch.rand(shape, generator=g) < 0.3, 0.0, levels)


@given(model=models, rows=rows_of_lengths, seed=st.integers(0, 99))
def test_the_sketch_of_a_document_is_its_own(model, rows, seed):
    _, latents, levels = draw(rows, seed)
    packed = model.sketch(latents, levels, documents=Documents.of(ids(rows), model.bos_slots))
    for row, edges in enumerate(rows):
        for start, stop in spans(edges):
            here = (slice(row, row + 1), slice(start, stop))
            torch.testing.assert_close(packed[here], model.sketch(latents[here], levels[here]), **EXACT)


@given(model=models, rows=rows_of_lengths, seed=st.integers(0, 99), data=st.data())
def test_the_refinement_of_a_document_is_its_own(model, rows, seed, data):
    _, latents, levels = draw(rows, seed)
    size = rows[0][-1]
    end = torch.tensor([data.draw(st.integers(1, size)) for _ in rows])
    prompt = torch.tensor([data.draw(st.integers(0, int(stop))) for stop in end])
    estimate = latents.flip(1) if model.self_conditioned else None
    packed = model.refine(
        latents, levels, prompt=prompt, end=end, estimate=estimate, documents=Documents.of(ids(rows), model.bos_slots)
    )
    for row, edges in enumerate(rows):
        for start, stop in spans(edges):
            present = int(end[row].clamp(max=stop)) - start
            if present < 1:
                continue
            here = (slice(row, row + 1), slice(start, stop))
            alone = model.refine(
                latents[here],
                levels[here],
                prompt=(prompt[row : row + 1] - start).clamp(0, stop - start),
                end=torch.tensor([present]),
                estimate=None if estimate is None else estimate[here],
            )
            torch.testing.assert_close(packed[here][:, :present], alone[:, :present], **EXACT)


@settings(max_examples=30)
@given(model=models, rows=rows_of_lengths, seed=st.integers(0, 99), data=st.data())
def test_a_suffix_is_that_of_its_document(model, rows, seed, data):
    tokens, latents, levels = draw(rows, seed)
    size = rows[0][-1]
    end = torch.tensor([data.draw(st.integers(1, size)) for _ in rows])
    prompt = torch.tensor([data.draw(st.integers(0, int(stop))) for stop in end])
    suffix = torch.tensor(
        [data.draw(st.integers(0, int(stop - start))) for start, stop in zip(prompt, end, strict=True)]
    )
    waiting = data.draw(st.booleans())
    known = torch.tensor([data.draw(st.integers(int(a), size)) for a in prompt]) if waiting else None
    estimate = latents.flip(1) if model.self_conditioned else None
    batch = as_batch(model, tokens, prompt, end, suffix, ids(rows))
    made = {"order": batch.order, "documents": batch.documents}
    sketched = model.sketch(latents, levels, known=known, **made)
    refined = model.refine(latents, levels, prompt=prompt, end=end, estimate=estimate, **made)
    for row, edges in enumerate(rows):
        for start, stop in spans(edges):
            there, count = min(int(end[row]), stop) - start, stop - start
            coded = min(int(end[row] - suffix[row]), stop) - start
            if coded < 1:
                continue
            here = (slice(row, row + 1), slice(start, stop))
            prompted = (prompt[row : row + 1] - start).clamp(0, coded)
            alone = as_batch(model, tokens[here], prompted, torch.tensor([there]), torch.tensor([there - coded]))
            behind = None if known is None else (known[row : row + 1] - start).clamp(0, count)
            torch.testing.assert_close(
                sketched[here][:, :coded],
                model.sketch(latents[here], levels[here], known=behind, order=alone.order)[:, :coded],
                **EXACT,
            )
            own = None if estimate is None else estimate[here]
            found = model.refine(
                latents[here], levels[here], prompt=alone.prompt, end=alone.end, estimate=own, order=alone.order
            )
            torch.testing.assert_close(refined[here][:, :coded], found[:, :coded], **EXACT)


@settings(max_examples=15)
@given(model=models, rows=rows_of_lengths, seed=st.integers(0, 99), level=st.sampled_from([0.0, 0.5]))
def test_the_bits_of_a_document_are_its_own(model, rows, seed, level):
    tokens, latents, _ = draw(rows, seed)
    levels = torch.full(tokens.shape, level, dtype=torch.float64)

    def sketched(batch: Batch, levels, noise):
        return Sketch(model, batch, levels, noise).bits()[0]

    packed = sketched(as_batch(model, tokens, documents=ids(rows)), levels, latents)
    nll = -model.log_prob(tokens, documents=ids(rows))
    for row, edges in enumerate(rows):
        for start, stop in spans(edges):
            here = (slice(row, row + 1), slice(start, stop))
            alone = sketched(as_batch(model, tokens[here]), levels[here], latents[here])
            torch.testing.assert_close(packed[here], alone, **EXACT)
            torch.testing.assert_close(nll[here], -model.log_prob(tokens[here]), **EXACT)


@settings(max_examples=10)
@given(model=models, rows=rows_of_lengths, seed=st.integers(0, 99))
def test_the_levels_of_a_document_are_its_own(model, rows, seed):
    tokens, noise, _ = draw(rows, seed)
    packed = learned_levels(model, as_batch(model, tokens, documents=ids(rows)), noise)
    for row, edges in enumerate(rows):
        for start, stop in spans(edges):
            here = (slice(row, row + 1), slice(start, stop))
            alone = learned_levels(model, as_batch(model, tokens[here]), noise[here])
            torch.testing.assert_close(packed[here], alone, rtol=1e-8, atol=1e-8)


@given(model=models, rows=rows_of_lengths, seed=st.integers(0, 99), data=st.data())
def test_no_gradient_leads_from_a_document_to_another(model, rows, seed, data):
    _, latents, levels = draw(rows, seed)
    latents.requires_grad_()
    documents = Documents.of(ids(rows), model.bos_slots)
    row = data.draw(st.integers(0, len(rows) - 1))
    start, stop = data.draw(st.sampled_from(spans(rows[row])))
    prompt = torch.full((len(rows),), data.draw(st.integers(0, rows[0][-1])))
    for hidden in (
        model.sketch(latents, levels, documents=documents),
        model.refine(latents, levels, prompt=prompt, documents=documents),
    ):
        # A function of all that is said of the document, so that nothing cancels.
        said = hidden[row, start:stop]
        found = torch.autograd.grad(
            (said * torch.randn(said.shape, generator=generator(seed), dtype=said.dtype)).sum(),
            latents,
            materialize_grads=True,
        )[0]
        outside = found.clone()
        outside[row, start:stop] = 0
        assert (outside == 0).all()
    assert (found[row, start:stop] != 0).any()


@given(model=models, size=st.integers(1, 14), seed=st.integers(0, 99))
def test_one_document_is_the_sequence(model, size, seed):
    _, latents, levels = draw([[size], [size]], seed)
    one = Documents.of(torch.full((2, size), 5), model.bos_slots)
    torch.testing.assert_close(model.sketch(latents, levels, documents=one), model.sketch(latents, levels), **EXACT)
    torch.testing.assert_close(model.refine(latents, levels, documents=one), model.refine(latents, levels), **EXACT)


@given(rows=rows_of_lengths)
def test_a_document_begins_where_its_id_changes(rows):
    given = ids(rows)
    # Odd ones have an id that comes again further on.
    found, same = Documents.of(given % 2, 1), Documents.of(given * 3 + 7, 0)
    for name in ("number", "begin", "places"):
        assert torch.equal(getattr(found, name), getattr(same, name))
    assert torch.equal(found.number, given)
    for row, edges in enumerate(rows):
        places = [at for start, stop in spans(edges) for at in range(stop - start)]
        assert found.places[row].tolist() == places
        assert found.begin[row].tolist() == [at == 0 for at in places]
    taken = found.take(slice(0, 1))
    assert torch.equal(taken.places, found.places[:1])


def test_a_step_of_training_takes_documents_and_padding():
    model = random_model(5, dtype=torch.float32, self_conditioning=True).train()
    rows = [[3, 9, 12], [12], [5, 6, 12]]
    tokens, _, _ = draw(rows, 0)
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    mask[2, 6:] = False
    packed = Packed(tokens=tokens, documents=ids(rows), loss_mask=mask)
    out = model(
        packed.tokens,
        documents=packed.documents,
        loss_mask=packed.loss_mask,
        lengths=packed.lengths,
        prompt_length=torch.tensor([4, 0, 2]),
        generator=generator(),
    )
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (out.bound[2, 6:] == 0).all()
    assert (out.bound[mask] != 0).all()


def test_an_evaluation_takes_documents():
    model, rows = MODELS["attended"], [[3, 9, 12], [12], [5, 6, 12]]
    tokens, _, _ = draw(rows, 1)
    found = evaluate(model, tokens, 0.0, documents=ids(rows), batch_size=2, progress=False)
    assert found.nats == pytest.approx(-model.log_prob(tokens, documents=ids(rows)).mean().item(), rel=1e-12)
    assert found.nats != pytest.approx(-model.log_prob(tokens).mean().item(), rel=1e-6)


def test_without_documents_there_is_no_matrix():
    documents = Documents.of(torch.zeros(1, 4, dtype=torch.int64), 1)
    assert documents.mask(Causal()).pieces(0, 5, 5) is None
    batch = as_batch(MODELS["attended"], torch.zeros(1, 4, dtype=torch.int64))
    assert batch.documents is None


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (torch.zeros(1, 4), r"documents must be int64 ids of shape \(1, 4\) on cpu, got torch.float32"),
        (torch.zeros(1, 5, dtype=torch.int64), r"got torch.int64 \(1, 5\)"),
    ],
)
def test_documents_that_do_not_fit_are_refused(documents, message):
    with pytest.raises(ValueError, match=message):
        MODELS["attended"](torch.zeros(1, 4, dtype=torch.int64), documents=documents)
