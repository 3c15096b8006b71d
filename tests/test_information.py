"""How much of a token a noisy latent still tells, and the schedule made of it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from evo.schedules import Cosine, InformationUniform, readable_information

F64 = torch.float64


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


TABLE = {  # r² / ln V → share readable at t = .3, .4, …, .9 on the cosine schedule
    1: (0.98, 0.77, 0.49, 0.25, 0.13, 0.05, 0.01),
    2: (1.00, 0.98, 0.78, 0.48, 0.25, 0.11, 0.03),
    4: (1.00, 1.00, 0.99, 0.81, 0.49, 0.20, 0.05),
}


@pytest.mark.parametrize("vocab_size", [100, 8192, 65536])
@pytest.mark.parametrize("power", TABLE)
def test_readable_information_on_the_cosine_schedule(power: int, vocab_size: int) -> None:
    log_snr = Cosine().log_snr(torch.linspace(0.3, 0.9, 7, dtype=F64))
    share = readable_information(log_snr, radius=math.sqrt(power * math.log(vocab_size)), vocab_size=vocab_size)
    # The table pools 64 and 512 dimensions; 65 536 directions overlap in 64, which costs up to .09 there.
    tolerance = 0.05 if vocab_size < 65536 else 0.07
    torch.testing.assert_close(share, torch.tensor(TABLE[power], dtype=F64), rtol=0, atol=tolerance)


def test_readable_information_is_that_of_random_directions() -> None:
    vocab_size, dim, samples, generator = 64, 512, 4000, torch.Generator().manual_seed(0)
    radius = math.sqrt(2 * math.log(vocab_size))
    weight = radius * nn.functional.normalize(torch.randn(vocab_size, dim, dtype=F64, generator=generator), dim=-1)
    log_snr = torch.tensor([-2.0, 0.0, 1.5], dtype=F64)
    tokens = torch.randint(vocab_size, (samples,), generator=generator)
    noise = torch.randn(samples, dim, dtype=F64, generator=generator)
    for wanted, ratio in zip(
        readable_information(log_snr, radius=radius, vocab_size=vocab_size), log_snr.exp(), strict=True
    ):
        latents = weight[tokens] + noise / ratio.sqrt()
        nats = nn.functional.cross_entropy(ratio * latents @ weight.T - ratio * radius**2 / 2, tokens, reduction="none")
        share = 1 - nats / math.log(vocab_size)
        # Four standard errors, and the overlap of 64 directions in 512 dimensions.
        assert abs(share.mean() - wanted) < 4 * share.std() / samples**0.5 + 0.01


@given(st.floats(0.3, 4), st.sampled_from([2, 100, 259, 65536]), st.floats(-20, 20))
def test_readable_information_falls_from_1_to_0(radius: float, vocab_size: int, log_snr: float) -> None:
    at = torch.tensor([math.inf, log_snr + 0.5, log_snr, -math.inf], dtype=F64)
    share = readable_information(at, radius=radius, vocab_size=vocab_size)
    close(share[[0, 3]], torch.tensor([1.0, 0.0], dtype=F64), 1e-7)
    assert (share.diff() <= 1e-7).all()
    # No channel of SNR a tells more than a/2 nats of power a (Gaussian capacity per unit of power).
    assert share[2] * math.log(vocab_size) <= radius**2 * math.exp(log_snr) / 2 + 1e-7


@pytest.mark.parametrize(("power", "vocab_size"), [(2, 8192), (2, 259), (0.5, 100), (4, 8192)])
def test_information_uniform_is_linear_in_readable_information(power: float, vocab_size: int) -> None:
    radius = math.sqrt(power * math.log(vocab_size))
    schedule = InformationUniform(radius, vocab_size)
    t = torch.linspace(0.01, 0.99, 50, dtype=F64)
    share = readable_information(schedule.log_snr(t), radius=radius, vocab_size=vocab_size)
    assert (share - (1 - t)).abs().max() < 0.03
    cosine_level = Cosine().level_of_log_snr(schedule.log_snr(t))
    close(0.95 * (1 - share) + 0.05 * cosine_level, t, 3e-4)
    at_t_min = schedule.log_snr(torch.tensor(schedule.t_min, dtype=F64))
    close(at_t_min, Cosine().log_snr(torch.tensor(0.1, dtype=F64)), 5e-3)


def test_information_uniform_reads_a_latent_space() -> None:
    space = SimpleNamespace(weight=torch.zeros(259, 8), radius=3.3)
    assert InformationUniform.of(space).config() == InformationUniform(3.3, 259).config()
