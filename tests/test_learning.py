"""What training does: gradients of the head, networks that were trained and still bound, heads that go where the data wants them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

import evo
from evo import Objective
from evo.core import ClockDensity, Exploration, Extremes
from evo.schedules import early_stop, full, late_start
from tests.conftest import generator, random_model

V, N = 4, 3
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=N)))


def distribution(seed: int) -> torch.Tensor:
    """A random distribution over all sequences, far from uniform: (V**N,) float64."""
    return (2 * torch.randn(len(SEQUENCES), generator=generator(seed), dtype=torch.float64)).softmax(0)


def small(**overrides) -> evo.Evo:
    return random_model(dtype=torch.float32, vocab_size=V, context=8, **overrides)


def trained(probabilities: torch.Tensor, steps: int, **overrides) -> evo.Evo:
    """A network and a head that have seen a distribution for a while."""
    torch.manual_seed(0)
    size = {"width": 32, "depth": 2, "heads": 2, "latent_dim": 8, "context": 8}
    model = evo.Evo.from_preset("tiny", vocab_size=V, **size, **overrides).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draws, clock, extremes = generator(0), ClockDensity(), Extremes()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 30) * max(0.05, 1 - step / steps)
        tokens = SEQUENCES[torch.multinomial(probabilities, 64, replacement=True, generator=draws)]
        objective = Objective(
            causal_weight=1.0, aux_weight=max(0.0, 1 - 4 * step / steps), clock=clock, extremes=extremes
        )
        out = model(tokens, generator=draws, objective=objective)
        objective.observe(out.observed)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(
    scope="module",
    params=[pytest.param(False, id="plain"), pytest.param(True, id="self-conditioned", marks=pytest.mark.slow)],
)
def network(request) -> evo.Evo:
    return trained(distribution(1), 200, self_conditioning=request.param)


@pytest.mark.parametrize(
    ("levels", "path"),
    [(0.0, early_stop), (0.5, full), (1.0, early_stop), (1.0, full), ("random", late_start), (None, early_stop)],
    ids=str,
)
def test_a_trained_network_codes_at_the_entropy_and_not_below_it(network, levels, path):
    """Against exact enumeration: the mean of bound + log p over samples is what coding costs beyond the entropy."""
    probabilities = distribution(1)
    chosen = torch.multinomial(probabilities, 1500, replacement=True, generator=generator(2))
    tokens = SEQUENCES[chosen]
    given = torch.rand(tokens.shape, generator=generator(3)) if levels == "random" else levels
    bound = -network.log_prob(tokens, given, path=path, clock_values=4, generator=generator(4)).double().sum(1)
    beyond = bound + probabilities[chosen].log()
    error = beyond.std().item() / math.sqrt(len(beyond))
    entropy = -(probabilities * probabilities.log()).sum().item()
    assert beyond.mean().item() > -4 * error
    assert beyond.mean().item() < entropy / 3, "training should have come near it"


def test_self_conditioning_changes_what_is_said_and_helps_only_through_its_input():
    network = small(self_conditioning=True)
    network.backbone.estimate_embed.weight.data.normal_(std=0.5)
    tokens = SEQUENCES[:20]
    run = {
        share: network.train()(tokens, levels=1.0, generator=generator(0), objective=Objective(self_conditioning=share))
        for share in (0.0, 0.5, 1.0)
    }
    differs = (run[0.5].flow_bits - run[0.0].flow_bits).abs().sum(1) > 0
    assert 0 < differs.sum() <= 10, "half of the sequences, but for those whose state the estimate cannot change"
    assert not differs[::2].any()
    torch.testing.assert_close(run[0.5].flow_bits[differs], run[1.0].flow_bits[differs])
    network.backbone.estimate_embed.weight.data.zero_()
    silent = [
        network(tokens, levels=1.0, generator=generator(0), objective=Objective(self_conditioning=share)).flow_bits
        for share in (0.0, 1.0)
    ]
    torch.testing.assert_close(silent[0], silent[1])


def test_self_conditioned_fields_are_functions_of_the_state_alone():
    network = random_model(self_conditioning=True)
    network.backbone.estimate_embed.weight.data.normal_(std=0.5)
    z = torch.randn(2, 5, network.latent_space.dim, generator=generator(0), dtype=torch.float64)
    level = torch.full((2, 5), 0.6, dtype=torch.float64)
    field = network.vector_field()
    first = field.denoise(z, level)
    torch.testing.assert_close(field(z, level), field.velocity(field.denoise(z, level, first.latents), z, level))
    assert not torch.allclose(field(z, level), field.velocity(first, z, level))


@pytest.mark.parametrize("causal", [0.0, 1.0])
def test_the_head_learns_the_slope_of_the_bound(causal):
    """Gradient of the head's bias against finite differences of the same bound, over every sequence, many noises and clock values."""
    model = random_model(vocab_size=V, context=8).train()
    tokens = SEQUENCES.repeat(24, 1)
    objective = Objective(
        aux_weight=0, entropy_weight=0, weight_cap=1e9, causal_weight=causal, exploration=Exploration(share=0, noise=0)
    )
    bias, step = model.timestep_head.outer.bias, 0.05 / model.timestep_head.gain

    def bound(seed: int, shift: float) -> torch.Tensor:
        with torch.no_grad():
            bias.add_(shift)
        out = model(tokens, generator=generator(seed), objective=objective)
        with torch.no_grad():
            bias.sub_(shift)
        return out.bound.sum(1).mean()

    gradients, slopes = [], []
    for seed in range(12):
        gradients.append(torch.autograd.grad(bound(seed, 0.0), bias)[0].item())
        with torch.no_grad():
            slopes.append((bound(seed, step) - bound(seed, -step)).item() / (2 * step))
    gradient, slope = torch.tensor(gradients), torch.tensor(slopes)
    apart = gradient - slope
    assert abs(apart.mean()) < 4 * apart.std() / math.sqrt(len(apart)) + 0.05 * abs(slope.mean())
    assert abs(slope.mean()) > 3 * slope.std() / math.sqrt(len(slope)), "there must be a slope to agree with"


def test_a_clean_first_pass_teaches_the_causal_half():
    """With every level at 1 the bound says nothing of the causal half; the first pass does."""
    model = small().train()
    with torch.no_grad():
        model.timestep_head.outer.bias.fill_(50.0)
    plain = Objective(aux_weight=0, entropy_weight=0, exploration=Exploration(share=0, noise=0))
    tokens = SEQUENCES[:32]
    both = [model(tokens, generator=generator(0), objective=replace(plain, causal_weight=w)) for w in (0.0, 0.7)]
    nll = torch.nn.functional.cross_entropy(model.context_logits(tokens).transpose(1, 2), tokens)
    torch.testing.assert_close(both[1].loss - both[0].loss, 0.7 * nll, rtol=1e-4, atol=1e-4)


def test_an_autoregressive_step_needs_no_flow():
    """At a level that is 0 as a number, the loss is that of a tensor of zeros, from one pass instead of two."""
    model = small().train()
    tokens, passes = SEQUENCES[:8], []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    number = model(tokens, levels=0.0, generator=generator(0))
    assert len(passes) == 1
    tensor = model(tokens, levels=torch.zeros(8, N), generator=generator(0))
    assert len(passes) == 3
    torch.testing.assert_close(number.loss, tensor.loss)
    assert (number.flow_bits == 0).all()
