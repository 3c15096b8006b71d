"""The bound and the loss: what is scored, what explores, where gradients go, and that the sum is a bound."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import evo
from evo import Objective
from evo.core import Exploration
from evo.core.bound import Sketch
from evo.core.chance import Chance
from evo.core.contract import as_batch
from evo.core.levels import random_levels, usage_entropy, with_logistic_noise
from evo.schedules import Path, early_stop, full, late_start
from evo.schedules.config import KNOWN
from tests.conftest import Given, generator, random_model

MODEL = random_model()
V, D = MODEL.latent_space.vocab_size, MODEL.latent_space.dim
PLAIN = Objective(aux_weight=0, entropy_weight=0, exploration=Exploration(share=0, noise=0))


def tokens_of(seed: int, batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(0, V, (batch, length), generator=generator(seed))


def levels_of(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


@given(seed=st.integers(0, 10**6), prompt=st.integers(0, 5))
def test_prompt_tokens_are_scored_by_their_causal_nll(seed, prompt):
    tokens = tokens_of(seed)
    out = MODEL(tokens, levels=0.7, prompt_length=prompt, generator=generator(seed))
    causal = F.cross_entropy(MODEL.context_logits(tokens).transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(out.bound[:, :prompt], causal[:, :prompt], rtol=0, atol=1e-10)
    assert (out.levels[:, :prompt] == 0).all()
    assert (out.levels[:, prompt:] == 0.7).all()


@given(seed=st.integers(0, 10**6), end=st.integers(2, 8))
def test_absent_tokens_are_seen_by_nobody_and_score_nothing(seed, end):
    tokens = tokens_of(seed)
    other = tokens.clone()
    other[:, end:] = tokens_of(seed + 1)[:, end:]
    lengths = torch.full((3,), end)
    levels = levels_of(seed, tokens.shape)
    first, second = (MODEL(x, levels=levels, lengths=lengths, generator=generator(seed)) for x in (tokens, other))
    assert torch.equal(first.bound, second.bound)
    assert (first.bound[:, end:] == 0).all()
    assert (first.bound[:, :end] != 0).all()


@given(seed=st.integers(0, 10**6))
def test_sequences_of_different_shapes_do_not_meet(seed):
    tokens = tokens_of(seed)
    prompt, lengths = torch.tensor([0, 2, 4]), torch.tensor([9, 5, 7])
    levels = levels_of(seed, tokens.shape)
    batch = as_batch(MODEL, tokens, prompt, lengths)
    noise = torch.randn(*tokens.shape, D, generator=generator(seed), dtype=torch.float64)
    clock = levels_of(seed + 1, (3,))
    together = Sketch(MODEL, batch, levels, noise)
    fresh = torch.randn(noise.shape, generator=generator(seed), dtype=torch.float64)
    logits = together.flow_bits(early_stop, clock, Given(fresh)).denoised.log_probs
    for row in range(3):
        here = slice(row, row + 1)
        size = int(lengths[row])
        alone = Sketch(
            MODEL,
            as_batch(MODEL, tokens[here, :size], prompt[here]),
            levels[here, :size],
            noise[here, :size],
        )
        expected = alone.flow_bits(early_stop, clock[here], Given(fresh[here, :size])).denoised.log_probs
        torch.testing.assert_close(
            logits[here, int(prompt[row]) : size], expected[:, int(prompt[row]) :], rtol=0, atol=1e-10
        )


@given(seed=st.integers(0, 10**6))
def test_the_loss_is_the_mean_over_what_is_scored(seed):
    tokens = tokens_of(seed)
    mask = levels_of(seed, tokens.shape) > 0.5
    mask[0, 0] = True
    levels = levels_of(seed + 1, tokens.shape)
    out = MODEL(tokens, loss_mask=mask, levels=levels, generator=generator(seed))
    unmasked = MODEL(tokens, levels=levels, generator=generator(seed))
    assert torch.equal(out.bound, unmasked.bound)
    torch.testing.assert_close(out.loss, out.bound[mask].mean())


@given(seed=st.integers(0, 10**6))
def test_every_term_of_the_objective_moves_the_loss_as_it_says(seed):
    model = random_model()
    model.train()
    tokens, levels = tokens_of(seed), levels_of(seed, (3, 9))

    def run(**terms):
        return model(
            tokens, levels=levels, generator=generator(seed), objective=replace(PLAIN, label_smoothing=0.0, **terms)
        )

    plain = run()
    torch.testing.assert_close(plain.loss, plain.bound.mean())
    priced = run(level_price=0.5)
    torch.testing.assert_close(priced.loss - plain.loss, 0.5 * levels.mean())
    entropic = run(entropy_weight=0.3)
    torch.testing.assert_close(
        plain.loss - entropic.loss, 0.3 * usage_entropy(levels, torch.ones(3, 9, dtype=torch.bool)).mean()
    )
    assert run(aux_weight=1.0).loss > plain.loss
    capped = run(weight_cap=0.01)
    assert capped.flow_bits.sum() < plain.flow_bits.sum()


@given(seed=st.integers(0, 10**6), level=st.sampled_from([0.0, 0.3, 1.0]), masked=st.booleans())
def test_the_auxiliary_term_is_shared_by_level_between_the_halves_and_over_what_is_scored(seed, level, masked):
    model = random_model()
    model.train()
    tokens, levels = tokens_of(seed), torch.full((3, 9), level, dtype=torch.float64)
    mask = levels_of(seed, tokens.shape) > 0.5 if masked else torch.ones(3, 9, dtype=torch.bool)
    mask[0, 0] = True
    with_it, without = (
        model(
            tokens,
            loss_mask=mask,
            levels=levels,
            generator=generator(seed),
            objective=replace(PLAIN, aux_weight=weight, label_smoothing=0.0),
        ).loss
        for weight in (1.0, 0.0)
    )
    # The noise in the order in which the model draws it.
    draws = generator(seed)
    noise = torch.randn(*tokens.shape, D, generator=draws, dtype=torch.float64)
    sketch = Sketch(model, as_batch(model, tokens), levels, noise)
    clock = (torch.arange(3, dtype=torch.float64) / 3 + torch.rand(1, generator=draws, dtype=torch.float64)) % 1
    refined = sketch.flow_bits(early_stop, clock, Chance(draws, 3)).denoised.log_probs
    halves = [
        F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")[mask].mean()
        for logits in (sketch.context_logits, refined)
    ]
    torch.testing.assert_close(with_it - without, torch.lerp(*halves, level), rtol=0, atol=1e-9)
    if level == 0:
        causal = F.cross_entropy(model.context_logits(tokens).transpose(1, 2), tokens, reduction="none")
        torch.testing.assert_close(with_it - without, causal[mask].mean(), rtol=0, atol=1e-9)


def test_gradients_reach_every_parameter_and_are_finite():
    model = random_model()
    model.train()
    out = model(
        tokens_of(0, 4), generator=generator(0), objective=Objective(exploration=Exploration(share=0.5, noise=1.0))
    )
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("level", [0.0, 0.1, 0.1 + 1e-7, 0.5, 1.0])
@pytest.mark.parametrize("path", [early_stop, late_start, full], ids=str)
def test_gradients_are_finite_at_the_edges_of_levels(level, path):
    model = random_model(dtype=torch.float32)
    model.train()
    levels = torch.full((3, 9), level, requires_grad=True)
    out = model(tokens_of(0), levels=levels, path=path, generator=generator(0))
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert levels.grad.isfinite().all()


@pytest.mark.parametrize("path", [early_stop, late_start, full], ids=str)
@pytest.mark.parametrize("level", [0.35, 0.6])
def test_the_gradient_of_the_flow_in_a_level_is_its_slope(path, level):
    """Pathwise against finite differences, for one free token a sequence, whose neighbours' levels cannot matter."""
    draws = generator(0)
    tokens = torch.randint(0, V, (4096, 3), generator=draws)
    batch = as_batch(MODEL, tokens, 2)
    noise = torch.randn(*tokens.shape, D, generator=draws, dtype=torch.float64)
    clock = (torch.arange(len(tokens), dtype=torch.float64) + 0.5) / len(tokens)

    def flow(t):
        levels = torch.full(tokens.shape, 0.0, dtype=torch.float64) + t
        return Sketch(MODEL, batch, levels, noise).flow_bits(path, clock, Given(noise.flip(0))).bits[:, 2]

    t = torch.tensor(level, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(flow(t).mean(), t)
    with torch.no_grad():
        slope = (flow(t + 0.02) - flow(t - 0.02)) / 0.04
    error = slope.std() / len(slope) ** 0.5
    assert abs(gradient - slope.mean()) < 4 * error + 0.05 * slope.mean().abs()
    assert slope.mean() > 5 * error, "there must be a slope to agree with"


@pytest.mark.parametrize("schedule", [kind for kind in KNOWN if kind not in ("shifted", "information_uniform")])
def test_gradients_in_a_level_are_finite_at_its_ends_on_every_schedule(schedule):
    model = random_model(dtype=torch.float32, schedule={"name": schedule})
    model.train()
    levels = torch.tensor([[0.0, 0.1, 1.0, 0.5, 1.0, 0.99]], requires_grad=True)
    model(tokens_of(0, 1, 6), levels=levels, generator=generator(0)).loss.backward()
    assert levels.grad.isfinite().all()


def test_the_price_and_the_entropy_of_levels_leave_prompts_alone():
    model = random_model()
    model.train()
    levels = torch.full((3, 9), 0.5, dtype=torch.float64, requires_grad=True)
    terms = replace(PLAIN, level_price=1.0, entropy_weight=1.0)
    model(tokens_of(0), levels=levels, prompt_length=4, objective=terms, generator=generator(0)).loss.backward()
    assert (levels.grad[:, :4] == 0).all()
    assert (levels.grad[:, 4:] != 0).all()


def test_the_head_learns_from_the_bound_through_the_level_alone():
    """The gradient of the levels reaches the head and nothing else: its first pass is not differentiated."""
    model = random_model()
    model.train()
    out = model(tokens_of(0), generator=generator(0), objective=PLAIN)
    (gradient,) = torch.autograd.grad(out.levels.sum(), model.timestep_head.outer.weight, retain_graph=True)
    assert gradient.abs().sum() > 0
    assert torch.autograd.grad(out.levels.sum(), model.backbone.embed.weight, allow_unused=True) == (None,)


def test_training_is_deterministic_in_its_generator():
    model = random_model(dtype=torch.float32)
    model.train()
    losses = [model(tokens_of(1), generator=generator(7)).loss for _ in range(2)]
    assert torch.equal(losses[0], losses[1])


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 40), share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_random_levels_are_levels_of_every_kind(seed, batch, share):
    levels, masked = random_levels(range(batch), 50, share, Chance(generator(seed), batch), torch.zeros(()))
    assert levels.shape == (batch, 50)
    assert ((levels >= 0) & (levels <= 1)).all()
    assert ((levels[masked] == 0) | (levels[masked] == 1)).all()
    assert abs(masked.sum().item() - share * batch) < 1 + math.log2(1 + batch), "evenly spread"
    levels = levels[~masked]
    if len(levels) >= 16:
        constant = (levels == levels[:, :1]).all(1)
        changes = (levels[:, 1:] != levels[:, :-1]).double().mean(1)
        assert constant.any()
        assert (changes > 0.5).any()
        assert ((changes > 0) & (changes < 0.4)).any()
        assert (levels == 0).any()
        assert (levels == 1).any()


@given(seed=st.integers(0, 10**6), weight=st.sampled_from([0.1, 1.0]))
def test_a_masked_sequence_is_coded_in_one_step_from_what_is_known_of_it(seed, weight):
    """By the causal half where a token is known, by the flow where it is not, which sees all that is known and pure noise."""
    model = random_model().train()
    tokens = tokens_of(seed)
    objective = replace(PLAIN, flow_weight=weight, exploration=Exploration(share=1.0, masked=1.0))
    refine, seen = model.refine, []

    def recorded(*state: torch.Tensor, **rest: object) -> torch.Tensor:
        seen.append((state, refine(*state, **rest)))
        return seen[-1][1]

    model.refine = recorded
    out = model(tokens, generator=generator(seed), objective=objective)
    unknown = out.levels == 1
    assert ((out.levels == 0) | unknown).all()
    assert (out.sketch_bits[unknown].abs() < 1e-10).all()
    assert (out.flow_bits[~unknown] == 0).all()
    assert (out.reconstruction == 0).all()
    torch.testing.assert_close(out.loss, (out.sketch_bits + weight * out.flow_bits).mean())
    (latents, level), hidden = seen[-1]
    assert torch.equal(level, out.levels)
    embeddings = model.latent_space.weight
    assert torch.equal(latents[~unknown], embeddings[tokens][~unknown])
    said = F.cross_entropy(model.readout(hidden, embeddings).transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(out.flow_bits[unknown], said[unknown], rtol=0, atol=1e-10)


@given(levels=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_logistic_noise_of_scale_zero_is_none(levels):
    levels = torch.tensor([levels], dtype=torch.float64)
    uniform = torch.rand(levels.shape, generator=generator(0), dtype=torch.float64)
    assert torch.equal(with_logistic_noise(levels, 0.0, uniform), levels)
    noisy = with_logistic_noise(levels, 1.0, uniform)
    assert ((noisy >= 0) & (noisy <= 1)).all()


def test_usage_entropy_rewards_variety():
    present = torch.ones(2, 64, dtype=torch.bool)
    alike, varied = torch.full((1, 64), 0.5), torch.linspace(0, 1, 64)[None]
    low, high = usage_entropy(torch.cat([alike, varied]), present).tolist()
    assert low < 0.9
    assert 2.2 < high <= math.log(10) + 1e-6


@pytest.fixture(scope="module")
def trained_on_coins() -> evo.Evo:
    """A network trained, and a head with it, on tokens that nothing can predict."""
    model = random_model(dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draws = generator(0)
    for _ in range(150):
        tokens = torch.randint(0, V, (16, 12), generator=draws)
        model(tokens, generator=draws, objective=Objective(aux_weight=0.1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("path", [early_stop, full], ids=str)
@pytest.mark.parametrize("levels", [0.0, 0.4, 0.7, 1.0, None])
def test_no_trained_network_codes_below_the_entropy(trained_on_coins, levels, path):
    tokens = torch.randint(0, V, (256, 12), generator=generator(1))
    found = evo.evaluate(trained_on_coins, tokens, levels, path=path, batch_size=64, generator=generator(2))
    assert found.nats > math.log(V) - 4 * found.standard_error
    assert found.nats < 1.25 * math.log(V), "training should have come near it"


class TestEvaluate:
    def test_it_agrees_with_the_exact_causal_nll(self):
        tokens = tokens_of(0, 7)
        found = evo.evaluate(MODEL, tokens, 0.0, batch_size=3)
        assert found.nats == pytest.approx(-MODEL.log_prob(tokens).mean().item(), abs=1e-12)
        assert found.tokens == 63
        assert found.flow == found.reconstruction == 0
        assert found.perplexity == pytest.approx(math.exp(found.nats))
        assert found.bits_per(63)["bits"] == pytest.approx(found.nats / math.log(2))

    def test_its_standard_error_is_that_of_repetition(self):
        tokens = tokens_of(3, 64, 5)
        runs = [
            evo.evaluate(MODEL, tokens, 1.0, clock_values=1, generator=generator(seed), batch_size=64)
            for seed in range(30)
        ]
        nats = torch.tensor([run.nats for run in runs])
        # Over repetitions only noise and clock vary, not the sequences; these are random tokens, so sequences hardly differ.
        claimed = sum(run.standard_error for run in runs) / len(runs)
        assert 0.5 < nats.std().item() / claimed < 1.5

    def test_more_clock_values_agree_and_say_it_more_precisely(self):
        tokens = tokens_of(4, 32)
        rough = evo.evaluate(MODEL, tokens, 0.8, clock_values=1, generator=generator(0))
        fine = evo.evaluate(MODEL, tokens, 0.8, clock_values=32, generator=generator(1))
        assert fine.standard_error < rough.standard_error
        assert abs(rough.nats - fine.nats) < 4 * math.hypot(rough.standard_error, fine.standard_error)

    def test_levels_below_snap_are_zero(self):
        tokens = tokens_of(5)
        assert evo.evaluate(MODEL, tokens, 0.3, snap=0.4).mean_level == 0
        assert evo.evaluate(MODEL, tokens, 0.5, snap=0.4).mean_level == pytest.approx(0.5)

    def test_it_takes_batches_and_leaves_the_mode(self):
        model = random_model()
        model.train()
        found = evo.evaluate(model, iter([tokens_of(0), tokens_of(1, 2, 4)]), 0.0)
        assert found.tokens == 3 * 9 + 2 * 4
        assert model.training

    @pytest.mark.parametrize("path", [early_stop, late_start], ids=str)
    def test_a_clock_that_runs_only_while_tokens_move_says_the_same(self, path):
        # One sequence many times: no difference between sequences hides that of the clock.
        tokens, measured = tokens_of(6, 1).repeat(384, 1), {"path": path, "batch_size": 384, "clock_values": 1}
        short = evo.evaluate(MODEL, tokens, 0.4, generator=generator(0), **measured)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(path), "stretch", Path.stretch)
            whole = evo.evaluate(MODEL, tokens, 0.4, generator=generator(1), **measured)
        assert abs(short.nats - whole.nats) < 4 * math.hypot(short.standard_error, whole.standard_error)
        assert short.standard_error < 0.8 * whole.standard_error

    def test_it_refuses_what_it_cannot_do(self):
        with pytest.raises(ValueError, match="no sequences"):
            evo.evaluate(MODEL, iter([]))
        with pytest.raises(ValueError, match="clock_values is 0"):
            evo.evaluate(MODEL, tokens_of(0), clock_values=0)
        with pytest.raises(ValueError, match="needs a row for each sequence"):
            evo.evaluate(MODEL, tokens_of(0), torch.zeros(2, 2))
