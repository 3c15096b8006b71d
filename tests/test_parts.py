"""The parts on their own: latent space, denoiser, vector field, heads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo import Evo
from evo.core import Denoiser, LatentSpace, VectorField
from evo.heads import (
    EntropyTimestep,
    FixedTimestep,
    LinearDecoder,
    NearestNeighborDecoder,
    NucleusPrior,
    Readout,
    TimestepHead,
)
from evo.schedules import Cosine
from evo.testing.strategies import schedules
from tests.conftest import generator, random_model

SEEDS = st.integers(0, 10**6)


def space_of(seed: int, vocab: int = 11, dim: int = 6, radius: float | None = None) -> LatentSpace:
    torch.manual_seed(seed)
    return LatentSpace(vocab, dim, radius).double()


class TestLatentSpace:
    @given(seed=SEEDS, radius=st.one_of(st.none(), st.floats(0.1, 10)))
    def test_every_embedding_lies_on_the_sphere(self, seed, radius):
        space = space_of(seed, radius=radius)
        expected = math.sqrt(2 * math.log(11)) if radius is None else radius
        torch.testing.assert_close(space.weight.norm(dim=-1), torch.full((11,), expected, dtype=torch.float64))

    @given(seed=SEEDS)
    def test_noise_from_the_seed_of_the_model_does_not_point_at_its_embeddings(self, seed):
        torch.manual_seed(seed)
        directions = LatentSpace(64, 32).directions.detach()
        noise = torch.randn(64, 32, generator=generator(seed))
        alignment = torch.nn.functional.cosine_similarity(directions, noise, dim=-1)
        assert alignment.mean().abs() < 6 / (64 * 32) ** 0.5

    @given(seed=SEEDS, schedule=schedules(), level=st.floats(0, 1), more=st.floats(-0.5, 0.5))
    def test_no_multiple_of_a_latent_is_nearer_to_the_clean_one_than_what_is_expected(
        self, seed, schedule, level, more
    ):
        """On average over noise, whose square is as long as the latent has dimensions."""
        space, schedule = space_of(seed), schedule.double()
        t = torch.tensor([level], dtype=torch.float64).clamp(min=schedule.t_min)
        share = space.expected(torch.ones(1, space.dim, dtype=torch.float64), t, schedule)[0, 0]
        signal, noise = schedule.signal(t), schedule.noise(t)

        def distance(multiple):
            return space.radius**2 * (1 - multiple * signal).square() + space.dim * (multiple * noise).square()

        assert distance(share + more) >= distance(share) - 1e-12

    @given(seed=SEEDS, schedule=schedules())
    def test_a_realised_token_is_what_is_expected_of_it(self, seed, schedule):
        space, schedule = space_of(seed), schedule.double()
        level = torch.full((11,), 0.99 * schedule.t_min, dtype=torch.float64)
        assert torch.equal(space.expected(space.weight, level, schedule), space.weight)

    @given(seed=SEEDS)
    def test_a_network_sees_nothing_of_pure_noise(self, seed):
        model = random_model(seed=seed)
        one, other = torch.randn(2, 1, 5, model.latent_space.dim, generator=generator(seed), dtype=torch.float64)
        level = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
        other = torch.where(level.unsqueeze(-1) > 0, other, one)
        assert torch.equal(model.refine(one, level), model.refine(other, level))
        assert torch.equal(model.sketch(one, level), model.sketch(other, level))

    @given(seed=SEEDS)
    def test_embedding_is_a_row_of_the_table(self, seed):
        space = space_of(seed)
        tokens = torch.randint(0, 11, (2, 5), generator=generator(seed))
        torch.testing.assert_close(space.embed(tokens), space.weight[tokens])
        assert torch.equal(space.nearest(space.embed(tokens)), tokens)

    @given(seed=SEEDS, level=st.floats(0.1, 1.0))
    def test_the_likelihood_is_that_of_a_gaussian(self, seed, level):
        space, schedule = space_of(seed), Cosine()
        latents = torch.randn(2, 3, 6, generator=generator(seed), dtype=torch.float64)
        levels = torch.full((2, 3), level, dtype=torch.float64)
        signal, noise = schedule.signal(levels), schedule.noise(levels)
        gaussian = torch.distributions.Normal(signal[..., None, None] * space.weight, noise[..., None, None])
        expected = gaussian.log_prob(latents.unsqueeze(-2)).sum(-1)
        difference = space.log_likelihood(latents, levels, schedule) - expected
        torch.testing.assert_close(difference, difference[..., :1].expand_as(difference), rtol=0, atol=1e-9)

    def test_sizes_that_cannot_be_are_refused(self):
        for arguments, said in (((1, 4), "vocab_size is 1"), ((5, 0), "dim is 0"), ((5, 4, -1.0), "radius is -1.0")):
            with pytest.raises(ValueError, match=said):
                LatentSpace(*arguments)


class TestDenoiser:
    @given(seed=SEEDS, level=st.floats(0.1, 1.0))
    def test_it_is_bayes_rule(self, seed, level):
        space, schedule = space_of(seed), Cosine()
        draws = generator(seed)
        context = torch.randn(1, 3, 11, generator=draws, dtype=torch.float64)
        latents = torch.randn(1, 3, 6, generator=draws, dtype=torch.float64)
        levels = torch.full((1, 3), level, dtype=torch.float64)
        found = Denoiser.of(space, schedule)(context, latents, levels)
        gaussian = torch.distributions.Normal(
            schedule.signal(levels)[..., None, None] * space.weight, schedule.noise(levels)[..., None, None]
        )
        joint = context.log_softmax(-1) + gaussian.log_prob(latents.unsqueeze(-2)).sum(-1)
        posterior = (joint - joint.logsumexp(-1, keepdim=True)).exp()
        torch.testing.assert_close(found.log_probs.exp(), posterior, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.latents, posterior @ space.weight, rtol=1e-9, atol=1e-9)

    def test_there_is_no_evidence_at_pure_noise_nor_for_a_realised_token(self):
        denoiser = Denoiser.of(space_of(0), Cosine())
        latents = torch.randn(1, 3, 6, generator=generator(0), dtype=torch.float64)
        context = torch.randn(1, 3, 11, generator=generator(1), dtype=torch.float64)
        posterior = denoiser.log_posterior(context, latents, torch.tensor([[1.0, 0.0, 0.05]], dtype=torch.float64))
        assert torch.equal(posterior, context.log_softmax(-1))

    @given(seed=SEEDS, level=st.floats(0.1, 0.999))
    def test_the_field_is_the_probability_flow_of_the_mixture(self, seed, level):
        """F = f z - g²/2 grad log p, with the score of the mixture by automatic differentiation of its density."""
        space, schedule = space_of(seed), Cosine()
        draws = generator(seed)
        context = torch.randn(11, generator=draws, dtype=torch.float64)
        field = VectorField(lambda latents, level: context.expand(*level.shape, -1), Denoiser.of(space, schedule))
        latents = torch.randn(1, 2, 6, generator=draws, dtype=torch.float64, requires_grad=True)
        levels = torch.full((1, 2), level, dtype=torch.float64)
        signal, noise = schedule.signal(levels)[..., None, None], schedule.noise(levels)[..., None, None]
        gaussian = torch.distributions.Normal(signal * space.weight, noise)
        density = (context.log_softmax(-1) + gaussian.log_prob(latents.unsqueeze(-2)).sum(-1)).logsumexp(-1)
        (score,) = torch.autograd.grad(density.sum(), latents)
        drift, diffusion = schedule.drift(levels)[..., None], schedule.diffusion(levels)[..., None]
        expected = drift * latents - 0.5 * diffusion**2 * score
        torch.testing.assert_close(field(latents, levels), expected, rtol=1e-7, atol=1e-7)

    @pytest.mark.filterwarnings("ignore:CPU Autocast")
    def test_evidence_keeps_its_precision_under_autocast(self):
        space, schedule = space_of(0).float(), Cosine()
        latents = torch.randn(1, 4, 6, generator=generator(0))
        levels = torch.full((1, 4), 0.15)
        denoiser = Denoiser.of(space, schedule)
        expected = denoiser.log_posterior(None, latents, levels)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(denoiser.log_posterior(None, latents, levels), expected)


class TestTimesteps:
    @given(seed=SEEDS, level=st.floats(0.01, 0.99), gain=st.floats(0.5, 20))
    def test_the_learned_head_starts_where_it_is_told(self, seed, level, gain):
        hidden, logits = torch.randn(2, 3, 8, generator=generator(seed)), torch.randn(2, 3, 5)
        levels = TimestepHead(8, initial_level=level, gain=gain)(hidden, logits)
        torch.testing.assert_close(levels, torch.full((2, 3), level))

    @given(seed=SEEDS, scale=st.floats(0, 50))
    def test_the_entropy_heuristic_is_monotone_in_entropy(self, seed, scale):
        base = torch.randn(1, 1, 9, generator=generator(seed), dtype=torch.float64)
        head = EntropyTimestep(low=0.1, high=0.9, power=0.5)
        sharp, flat = head(base, base * (scale + 1)), head(base, base * scale)
        assert 0 <= sharp <= flat <= 1

    def test_the_entropy_heuristic_at_its_ends(self):
        head = EntropyTimestep()
        certain = torch.full((1, 1, 4), -torch.inf)
        certain[..., 0] = 0
        assert head(certain, certain).item() == 0
        assert head(certain, torch.zeros(1, 1, 4)).item() == pytest.approx(1, abs=1e-6)

    def test_fixed(self):
        assert (FixedTimestep(0.25)(torch.zeros(2, 3, 8), torch.zeros(2, 3, 5)) == 0.25).all()

    @pytest.mark.parametrize(
        "make",
        [
            lambda: FixedTimestep(1.5),
            lambda: TimestepHead(4, initial_level=1),
            lambda: TimestepHead(4, gain=0.0),
            lambda: EntropyTimestep(low=0.9, high=0.1),
        ],
    )
    def test_levels_that_are_none_are_refused(self, make):
        with pytest.raises(ValueError, match=r"1\.5|is 1;|gain is 0|low 0\.9"):
            make()


class TestNucleusPrior:
    @given(seed=SEEDS, top_p=st.floats(0.05, 1.0), temperature=st.floats(0.1, 3))
    def test_it_keeps_the_smallest_set_that_reaches_p(self, seed, top_p, temperature):
        logits = 2 * torch.randn(4, 12, generator=generator(seed), dtype=torch.float64)
        kept = NucleusPrior(top_p=top_p, temperature=temperature).log_probs(logits)
        probs = (logits / temperature).softmax(-1)
        for row in range(4):
            inside = kept[row] > -torch.inf
            mass = probs[row][inside].sum()
            assert mass >= top_p - 1e-9
            if inside.sum() > 1:
                assert mass - probs[row][inside].min() < top_p + 1e-9
            torch.testing.assert_close(kept[row].exp().sum(), torch.ones((), dtype=torch.float64))
            torch.testing.assert_close(kept[row][inside].exp(), probs[row][inside] / mass)

    def test_what_is_drawn_has_the_distribution_it_claims(self):
        prior = NucleusPrior(top_p=0.8, temperature=1.3)
        logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
        drawn = prior(logits.expand(20_000, 5), torch.rand(20_000, generator=generator(0)))
        counts = torch.bincount(drawn, minlength=5).double()
        expected = prior.log_probs(logits).exp().double() * 20_000
        kept = expected > 0
        assert counts[~kept].sum() == 0
        chi_squared = ((counts - expected)[kept].square() / expected[kept]).sum()
        assert chi_squared < 20, "the 0.999 quantile for 4 degrees of freedom is 18.5"

    @given(seed=SEEDS)
    def test_temperature_zero_is_greedy(self, seed):
        logits = torch.randn(3, 4, 7, generator=generator(seed))
        prior = NucleusPrior(temperature=0)
        assert torch.equal(prior(logits, torch.rand(3, 4)), logits.argmax(-1))
        assert torch.equal(prior.log_probs(logits).argmax(-1), logits.argmax(-1))

    @given(seed=SEEDS, top_p=st.sampled_from([0.9, 1.0]))
    def test_the_lowest_temperature_is_greedy_too(self, seed, top_p):
        logits = 100 * torch.randn(3, 4, 7, generator=generator(seed))
        prior = NucleusPrior(temperature=1e-30, top_p=top_p)
        assert torch.equal(prior(logits, torch.rand(3, 4)), logits.argmax(-1))

    @pytest.mark.parametrize(
        "wrong",
        [{"top_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 1e-40}],
    )
    def test_settings_that_mean_nothing_are_refused(self, wrong):
        with pytest.raises(ValueError, match=r"top_p is|temperature is"):
            NucleusPrior(**wrong)


@given(seed=SEEDS)
def test_decoders_agree_where_the_posterior_is_certain(seed):
    space = space_of(seed)
    tokens = torch.randint(0, 11, (2, 4), generator=generator(seed))
    logits = 100 * torch.nn.functional.one_hot(tokens, 11).double()
    denoised = logits.softmax(-1) @ space.weight
    for decoder in (LinearDecoder(), NearestNeighborDecoder()):
        assert torch.equal(decoder(logits, denoised, space.weight, torch.rand(2, 4)), tokens)


def test_the_readout_widens_what_it_says():
    readout = Readout(8, 6, 11).bfloat16()
    assert readout(torch.randn(2, 8), torch.randn(11, 6)).dtype == torch.float32


@pytest.mark.parametrize(("name", "billions"), [("S", 1.3), ("B", 2.7), ("L", 5.2), ("XL", 8.5), ("H", 13.0)])
def test_presets_have_the_size_of_the_paper(name, billions):
    with torch.device("meta"):
        model = Evo.from_preset(name, vocab_size=2**16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert abs(count / (billions * 1e9) - 1) < 0.03
