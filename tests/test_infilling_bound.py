"""The bound on what stands between two texts, and models that were trained to write it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evo import Evo, Objective, evaluate
from evo.heads import FixedTimestep
from evo.schedules import early_stop, full
from tests.conftest import generator, random_model

MODELS = {name: random_model(**each) for name, each in {"attended": {}, "detached": {"bos": "detached"}}.items()}
MODEL = MODELS["attended"]
V = MODEL.latent_space.vocab_size
SEEDS = st.integers(0, 10**6)


def draw(seed: int, size: int = 9, batch: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, prompt lengths, suffix lengths and lengths; windows may be empty, and so may everything else."""
    draws = generator(seed)
    cuts = torch.randint(0, size + 1, (batch, 3), generator=draws).sort(1).values
    prompt, stop, end = cuts.unbind(1)
    end = end.clamp(min=1)
    return torch.randint(0, V, (batch, size), generator=draws), prompt, end - stop, end


def causal_nll(model: Evo, tokens: list[int], prompt: int, suffix: int) -> list[float]:
    """Nats of each token of prompt and window: one token at a time, its context laid out by hand, nothing computed together."""
    embeddings, bos, stop = model.latent_space.weight, model.bos_slots, len(tokens) - suffix
    found = []
    for place, token in enumerate(tokens[:stop]):
        rows = [(model.bos, 0)] * bos + [
            (embeddings[each], bos + i) for i, each in enumerate(tokens[: min(place, prompt)])
        ]
        if place >= prompt and suffix:
            again = rows[-1:]
            rows += [(embeddings[tokens[i]], bos + i) for i in range(stop, len(tokens))] + again
        rows += [(embeddings[tokens[i]], bos + i) for i in range(prompt, place)]
        if not bos and not place:
            hidden = model.first_hidden(1)
        else:
            latents = torch.stack([latent for latent, _ in rows])[None]
            positions = torch.tensor([[position for _, position in rows]])
            hidden = model.backbone(latents, torch.zeros(latents.shape[:2]).double(), positions=positions)
        found.append(F.cross_entropy(model.readout(hidden[:, -1], embeddings), torch.tensor([token])).item())
    return found


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(seed=SEEDS)
def test_at_level_0_the_bits_are_the_causal_nll_in_view_of_the_suffix(name, seed):
    tokens, prompt, suffix, end = draw(seed)
    out = MODELS[name](tokens, levels=0.0, prompt_length=prompt, suffix_length=suffix, lengths=end)
    expected = torch.zeros_like(out.bound)
    for row in range(len(tokens)):
        nats = causal_nll(MODELS[name], tokens[row, : end[row]].tolist(), int(prompt[row]), int(suffix[row]))
        expected[row, : len(nats)] = torch.tensor(nats, dtype=torch.float64)
    torch.testing.assert_close(out.bound, expected, rtol=0, atol=1e-10)
    assert (out.flow_bits == 0).all()
    log_prob = MODELS[name].log_prob(tokens, prompt_length=prompt, suffix_length=suffix, lengths=end)
    torch.testing.assert_close(-log_prob, expected, rtol=0, atol=1e-10)


@given(seed=SEEDS, level=st.sampled_from([0.0, 0.5, None]))
def test_without_suffixes_the_bound_is_what_it_is_without_their_name(seed, level):
    tokens, prompt, _, end = draw(seed)
    none = torch.zeros_like(prompt)
    given_none, plain = (
        MODEL(tokens, levels=level, prompt_length=prompt, lengths=end, generator=generator(seed), **options)
        for options in ({"suffix_length": none}, {})
    )
    for part in ("sketch_bits", "flow_bits", "reconstruction", "levels", "loss"):
        torch.testing.assert_close(getattr(given_none, part), getattr(plain, part), rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=8)
@given(seed=SEEDS)
def test_a_suffix_is_not_scored_and_what_it_says_counts(training, seed):
    model = random_model(self_conditioning=True).train(training)
    tokens = torch.randint(0, V, (6, 9), generator=generator(seed))
    run = []
    for each in (tokens, torch.cat([tokens[:, :6], (tokens[:, 6:] + 1) % V], 1)):
        out = model(
            each, prompt_length=2, suffix_length=3, generator=generator(seed), objective=Objective(causal_weight=1.0)
        )
        assert (out.levels[:, :2] == 0).all()
        assert (out.levels[:, 6:] == 0).all()
        assert (out.bound[:, 6:] == 0).all()
        run.append(out)
    torch.testing.assert_close(run[0].bound[:, :2], run[1].bound[:, :2], rtol=0, atol=1e-10)
    assert (run[0].bound[:, 2:6] != run[1].bound[:, 2:6]).any(1).all()
    if not training:
        scored = (out.bound * (torch.arange(9) < 6)).sum() / (6 * 6)
        torch.testing.assert_close(out.loss, scored, rtol=0, atol=1e-10)


def test_suffixes_that_do_not_fit_are_refused():
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"prompts of \[4, 4\] and suffixes of \[3, 3\] tokens do not fit"):
        MODEL(tokens, prompt_length=4, suffix_length=3)
    with pytest.raises(ValueError, match=r"suffix_length must lie in \[0, 6\], got 7"):
        MODEL.log_prob(tokens, suffix_length=7)


SEQUENCES = torch.tensor(list(itertools.product(range(4), repeat=3)))


@pytest.fixture(scope="module")
def network() -> tuple[Evo, Tensor]:
    """A network that has seen a distribution of three tokens, with the last one or two as suffix."""
    probabilities = (2 * torch.randn(64, generator=generator(1), dtype=torch.float64)).softmax(0)
    torch.manual_seed(0)
    size = {"width": 32, "depth": 2, "heads": 2, "latent_dim": 8, "context": 8}
    model, draws, steps = Evo.from_preset("tiny", vocab_size=4, **size).train(), generator(0), 200
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    suffix = torch.tensor([1, 2]).repeat(32)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 30) * max(0.05, 1 - step / steps)
        tokens = SEQUENCES[torch.multinomial(probabilities, 64, replacement=True, generator=draws)]
        objective = Objective(causal_weight=1.0, aux_weight=max(0.0, 1 - 4 * step / steps))
        model(tokens, suffix_length=suffix, generator=draws, objective=objective).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), probabilities


@pytest.mark.parametrize(
    ("suffix", "levels", "path"),
    [(1, 0.0, early_stop), (2, 0.0, early_stop), (2, 0.5, full), (2, 1.0, early_stop), (2, None, early_stop)],
    ids=str,
)
def test_a_trained_network_codes_windows_at_the_conditional_entropy_and_not_below(network, suffix, levels, path):
    """Against exact enumeration: the mean of bound + log p(window | suffix) is what coding costs beyond H(window | suffix)."""
    model, probabilities = network
    joint = probabilities.view(4, 4, 4)
    conditional = (joint / joint.sum(tuple(range(3 - suffix)), keepdim=True)).flatten()
    # What the suffix says of the window, I(window; suffix): whoever has not seen it cannot come nearer than this.
    window = joint.sum(tuple(range(3 - suffix, 3)), keepdim=True).expand_as(joint).flatten()
    said = (probabilities * (conditional.log() - window.log())).sum().item()
    chosen = torch.multinomial(probabilities, 1500, replacement=True, generator=generator(2))
    log_prob = model.log_prob(
        SEQUENCES[chosen], levels, suffix_length=suffix, path=path, clock_values=4, generator=generator(4)
    )
    beyond = -log_prob.double().sum(1) + conditional[chosen].log()
    error = beyond.std().item() / math.sqrt(len(beyond))
    assert beyond.mean().item() > -4 * error
    assert beyond.mean().item() < 0.8 * said, "training should have come nearer than anyone who has not seen the suffix"
    found = evaluate(model, SEQUENCES[chosen], levels, suffix_length=suffix, path=path, clock_values=1, progress=False)
    assert found.tokens == 1500 * (3 - suffix)


@pytest.fixture(scope="module")
def copyist() -> Evo:
    """Trained on two random tokens behind one that means nothing, the same two, in reverse, on their right: as words and as noise."""
    torch.manual_seed(0)
    size = {"width": 32, "depth": 2, "heads": 2, "latent_dim": 8, "context": 8}
    model, draws, steps = Evo.from_preset("tiny", vocab_size=5, **size).train(), generator(0), 240
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 30) * max(0.05, 1 - step / steps)
        level = float(step % 2)
        model(mirrored(48, draws), levels=level, prompt_length=1, suffix_length=2, generator=draws).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def mirrored(batch: int, draws: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 5, (batch, 3), generator=draws)
    return torch.cat([drawn, drawn[:, 1:].flip(1)], 1)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_what_the_suffix_says_is_written_and_cannot_be_known_without_it(copyist, level):
    tokens = mirrored(200, generator(1))
    options = {"timestep_head": FixedTimestep(level), "temperature": 0}
    infilled = copyist.infill(tokens[:, :1], tokens[:, 3:], 2, generator=generator(0), **options).tokens
    generated = copyist.generate(tokens[:, :1], 2, generator=generator(0), **options).tokens
    assert (infilled == tokens[:, 1:3]).double().mean() > 0.85
    assert (generated == tokens[:, 1:3]).double().mean() < 0.35
