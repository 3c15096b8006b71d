"""B-1: bits are conserved, whatever the levels. B-2: the discrete bound approaches the continuous one at rate 1/T."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evo import Evo
from evo.core.duality import (
    ConservedBits,
    EnumeratedTokens,
    Estimate,
    gaussian_discrete_bound,
    split_bits,
    split_model_bits,
)
from evo.schedules import Cosine, Schedule, full
from evo.testing import strategies


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_conserved(bits: ConservedBits) -> None:
    assert abs(bits.excess.mean) <= 4 * bits.excess.standard_error + 1e-9, (
        f"H = {bits.entropy:.4f}, excess {bits.excess}"
    )


def pair(schedule: Schedule, flip: float = 0.02) -> EnumeratedTokens:
    """Two binary tokens that are equal but for a share `flip` of each other combination."""
    probabilities = torch.tensor([[0.5 - flip, flip], [flip, 0.5 - flip]], dtype=torch.float64)
    embeddings = torch.tensor([[1.2], [-1.2]], dtype=torch.float64)
    return EnumeratedTokens(schedule=schedule, probabilities=probabilities, embeddings=embeddings)


# The oracle itself.


@given(strategies.enumerated_tokens(max_vocab=3, max_length=3), st.data())
@settings(max_examples=15)
def test_posterior_and_context_are_those_of_bayes_rule_summed_by_hand(
    tokens: EnumeratedTokens, data: st.DataObject
) -> None:
    schedule, (v, n) = tokens.schedule, (tokens.vocab_size, tokens.length)
    level = data.draw(strategies.levels(1, n, 0.2, 0.9))
    latents = torch.randn(1, n, tokens.embeddings.shape[1], dtype=torch.float64, generator=seeded())
    s, var = schedule.signal(level)[0], schedule.noise(level)[0] ** 2

    def joint(sequence: tuple[int, ...], seen: int) -> float:
        distance = (latents[0] - s[:, None] * tokens.embeddings[list(sequence)]).square().sum(-1)
        return (tokens.probabilities[sequence] * (-distance / 2 / var)[:seen].sum().exp()).item()

    everything = list(itertools.product(range(v), repeat=n))
    evidence = tokens.evidence(latents, level)
    posterior = torch.tensor([joint(sequence, n) for sequence in everything], dtype=torch.float64)
    torch.testing.assert_close(tokens.posterior(evidence)[0].exp(), posterior / posterior.sum(), rtol=1e-9, atol=1e-12)
    context = tokens.context_log_probs(evidence)[0].exp()
    for i in range(n):
        by_token = torch.tensor(
            [sum(joint(s, i) for s in everything if s[i] == token) for token in range(v)], dtype=torch.float64
        )
        torch.testing.assert_close(context[i], by_token / by_token.sum(), rtol=1e-9, atol=1e-12)


@given(strategies.enumerated_tokens(max_vocab=3, max_length=2), st.data())
@settings(max_examples=15)
def test_score_is_the_gradient_of_the_log_density(tokens: EnumeratedTokens, data: st.DataObject) -> None:
    schedule = tokens.schedule
    level = data.draw(strategies.levels(2, tokens.length, 0.2, 0.9))
    latents = torch.randn(
        2, tokens.length, tokens.embeddings.shape[1], dtype=torch.float64, generator=seeded(), requires_grad=True
    )
    sequences = torch.cartesian_prod(*[torch.arange(tokens.vocab_size)] * tokens.length).view(-1, tokens.length)
    mean = schedule.signal(level)[:, None, :, None] * tokens.embeddings[sequences]
    log_normal = -((latents[:, None] - mean) / schedule.noise(level)[:, None, :, None]).square().sum((-1, -2)) / 2
    density = (tokens.log_probabilities + log_normal).logsumexp(-1).sum()
    (gradient,) = torch.autograd.grad(density, latents)
    torch.testing.assert_close(tokens.score(latents.detach(), level), gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (torch.full((2, 3), 1 / 6), "one axis per token"),
        (torch.full((2, 2), 0.3), "sum to 1"),
        (torch.tensor([1.5, -0.5]), "non-negative"),
    ],
)
def test_a_wrong_distribution_is_refused(probabilities: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnumeratedTokens(schedule=Cosine(), probabilities=probabilities, embeddings=torch.eye(2))


# B-1.


@given(strategies.enumerated_tokens(), st.data())
@settings(max_examples=12)
def test_bits_are_conserved_at_fixed_levels(tokens: EnumeratedTokens, data: st.DataObject) -> None:
    levels = data.draw(strategies.levels(1, tokens.length))[0]
    path = data.draw(strategies.paths(tokens.length))
    assert_conserved(split_bits(tokens, levels, generator=seeded(), path=path, sequences=2048, clock_values=24))


@given(strategies.enumerated_tokens())
@settings(max_examples=10)
def test_bits_are_conserved_at_random_levels(tokens: EnumeratedTokens) -> None:
    levels = (1.5 * torch.rand(2048, tokens.length, dtype=torch.float64, generator=seeded(1)) - 0.25).clamp(0, 1)
    assert_conserved(split_bits(tokens, levels, generator=seeded(), sequences=2048, clock_values=24))


def by_confidence(tokens: EnumeratedTokens, first: float, threshold: float = 0.35):
    """A rule: the first token at `first`; each other a word at once where the latent before it leaves little doubt, else noise."""

    def rule(latents: Tensor, levels: Tensor) -> Tensor:
        if levels.shape[1] == 0:
            return (
                torch.full_like(latents[:, 0, 0], first)
                if latents.shape[1]
                else torch.full((len(levels),), first, dtype=torch.float64)
            )
        belief = tokens.evidence(latents[:, -1:], levels[:, -1:])[:, 0].softmax(-1)
        return torch.where(torch.special.entr(belief).sum(-1) > threshold, 1.0, 0.0).double()

    return rule


@given(strategies.enumerated_tokens(), st.floats(0.2, 0.9))
@settings(max_examples=10)
def test_bits_are_conserved_at_levels_computed_from_the_latents(tokens: EnumeratedTokens, first: float) -> None:
    assert_conserved(
        split_bits(tokens, by_confidence(tokens, first), generator=seeded(), sequences=2048, clock_values=24)
    )


class FreshNoise(Cosine):
    """The mutant: a latent at a lower level forgets the noise of the sketch."""

    def bridge(self, noise: Tensor, level: Tensor, new_level: Tensor, fresh: Tensor) -> Tensor:
        return fresh


def test_fresh_noise_at_adaptive_levels_is_a_bound_below_the_entropy() -> None:
    honest, leaking = (pair(schedule) for schedule in (Cosine(), FreshNoise()))
    bits = split_bits(honest, by_confidence(honest, 0.5), generator=seeded(), sequences=16384)
    leak = split_bits(leaking, by_confidence(leaking, 0.5), generator=seeded(), sequences=16384)
    assert_conserved(bits)
    assert leak.excess.mean < -10 * leak.excess.standard_error, f"{leak.total} against H = {leak.entropy:.4f}"


def test_fresh_noise_at_fixed_levels_is_as_good_as_the_bridge() -> None:
    assert_conserved(split_bits(pair(FreshNoise()), torch.tensor([0.5, 0.8]), generator=seeded(), sequences=4096))


@given(strategies.enumerated_tokens())
@settings(max_examples=10)
def test_at_level_0_all_bits_are_the_sketchs_and_exact(tokens: EnumeratedTokens) -> None:
    bits = split_bits(tokens, torch.zeros(tokens.length), generator=seeded(), sequences=64, clock_values=4)
    assert abs(bits.excess.mean) < 1e-10
    assert bits.flow == bits.reconstruction == Estimate(0.0, 0.0)


@given(strategies.enumerated_tokens(schedule=Cosine().double()))
@settings(max_examples=10)
def test_at_level_1_of_a_schedule_that_ends_in_noise_the_sketch_has_no_bits(tokens: EnumeratedTokens) -> None:
    bits = split_bits(tokens, torch.ones(tokens.length), generator=seeded(), sequences=64, clock_values=4)
    assert abs(bits.sketch.mean) < 1e-12


# The split of a model.


@pytest.fixture(scope="module")
def model() -> Evo:
    torch.manual_seed(0)
    return Evo.from_preset("tiny", vocab_size=11, width=32, heads=2, depth=1).double().eval()


def test_the_split_of_a_model_sums_to_its_bound_and_is_exact_at_level_0(model: Evo) -> None:
    tokens = torch.randint(11, (5, 6), generator=seeded())
    causal = -model.context_logits(tokens).log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))
    bits = split_model_bits(model, tokens, 0.0, generator=seeded(), draws=2)
    assert math.isclose(bits.total.mean, causal.mean().item(), rel_tol=1e-12)
    assert bits.flow.mean == bits.reconstruction.mean == 0
    bits = split_model_bits(model, tokens, 0.6, generator=seeded(), path=full, draws=3)
    assert math.isclose(bits.total.mean, bits.sketch.mean + bits.flow.mean + bits.reconstruction.mean, rel_tol=1e-12)
    assert bits.flow.mean > 0


def test_the_split_of_a_model_in_training_is_refused(model: Evo) -> None:
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        split_model_bits(model, torch.zeros(2, 3, dtype=torch.int64), generator=seeded())
    model.eval()


# B-2.


@given(strategies.schedules(), st.floats(0.1, 4))
@settings(max_examples=30)
def test_the_gap_of_the_discrete_bound_falls_as_its_expansion_says(schedule: Schedule, variance: float) -> None:
    """A left Riemann sum misses ½∫σ²/(1 + σ²·SNR) dSNR by Δ²/(4T)·mean of SNR'²·σ⁴/(1 + σ²·SNR)²: rate 1/T, with this constant."""
    start, end = 0.95, schedule.t_min
    grid = torch.linspace(end, start, 40_001, dtype=torch.float64)
    with torch.no_grad():
        curvature = (schedule.d_snr(grid) * variance / (1 + variance * schedule.snr(grid))).square()
        constant = (start - end) ** 2 / 4 * torch.trapezoid(curvature, dx=1 / 40_000).item()
        bounds = [gaussian_discrete_bound(schedule, variance, steps, start=start) for steps in (50_000, 100_000)]
    for bound in bounds:
        assert bound.gap > 0
        assert bound.gap * bound.steps == pytest.approx(constant, rel=0.01)


@given(strategies.schedules(), st.floats(0.1, 4), st.integers(1, 30))
def test_the_terms_are_kl_divergences_between_the_gaussian_transitions(
    schedule: Schedule, variance: float, steps: int
) -> None:
    """q(z' | z, x) is Gaussian (Kingma et al. 2021, appendix A); its KL to itself at x̂, averaged over x and z, in closed form."""
    with torch.no_grad():
        level = torch.linspace(0.95, schedule.t_min, steps + 1, dtype=torch.float64)
        s, n = schedule.signal(level), schedule.noise(level)
        s, new_s, n, new_n = s[:-1], s[1:], n[:-1], n[1:]
        step_variance = n**2 - (s / new_s) ** 2 * new_n**2
        spread = step_variance * new_n**2 / n**2
        weight = new_s * step_variance / n**2  # of x in the mean of q(z' | z, x)
        error = variance * n**2 / (s**2 * variance + n**2)
        kl = (weight**2 * error / (2 * spread)).sum().item()
        bound = gaussian_discrete_bound(schedule, variance, steps, start=0.95)
    assert bound.discrete == pytest.approx(kl, rel=1e-8)


def test_the_sum_of_the_terms_does_not_vanish() -> None:
    """What the paper's Eq. 8 calls the gap is the flow bits themselves."""
    bound = gaussian_discrete_bound(Cosine(), 1.0, 100_000)
    assert bound.gap < 1e-2
    assert bound.discrete > 1.5


@pytest.mark.parametrize(
    "arguments", [{"steps": 0}, {"steps": 4, "start": 0.1}, {"steps": 4, "start": 1.5}, {"steps": 4, "end": 0.0}]
)
def test_impossible_steps_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="steps >= 1"):
        gaussian_discrete_bound(Cosine(), 1.0, **arguments)
