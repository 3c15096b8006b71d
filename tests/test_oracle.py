"""B-1 on the code that computes bounds: under ideal predictors `measure` gives the entropy, whatever the levels, and less if it leaks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from evo.core.bound import Batch
from evo.core.chance import Chance
from evo.core.contract import as_part
from evo.core.evaluation import measure
from evo.core.latent_space import evidence_query, evidence_table
from evo.core.objective import Output
from evo.schedules import Cosine, Path, early_stop, full, late_start
from evo.testing import EnumeratedTokens
from tests.conftest import generator

V, N, SEQUENCES = 3, 3, 8192


class Oracle:
    """What `measure` asks of an Evo, answered by enumeration: hidden states are log-probabilities, the head sees how sure they are."""

    def __init__(self, distribution: EnumeratedTokens) -> None:
        self.distribution, self.schedule = distribution, distribution.schedule
        embeddings = distribution.embeddings
        self.bos, self.self_conditioned = embeddings[0], False
        self.latent_space = SimpleNamespace(
            weight=embeddings, directions=embeddings, vocab_size=len(embeddings), dim=embeddings.shape[1]
        )

    def sketch(self, latents: Tensor, level: Tensor, **_: object) -> Tensor:
        return self.distribution.context_log_probs(self.distribution.evidence(latents, level))

    def refine(self, latents: Tensor, level: Tensor, **_: object) -> Tensor:
        posterior = self.distribution.posterior(self.distribution.evidence(latents, level))
        joint = posterior.unflatten(1, (V,) * N)
        others = [tuple(axis for axis in range(1, N + 1) if axis != i + 1) for i in range(N)]
        marginals = torch.stack([joint.logsumexp(axes) for axes in others], 1)
        # The denoiser will add what each latent says of its own token.
        return marginals - evidence_query(latents, level, self.schedule) @ evidence_table(self.latent_space.weight).T

    def readout(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        return hidden

    def timestep_head(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Noise where the context leaves doubt, a word where it does not: adaptive, and as eager to leak as can be."""
        doubt = torch.special.entr(logits.softmax(-1)).sum(-1) > 0.7
        return torch.cat([torch.full_like(doubt[:, :1], 0.5, dtype=logits.dtype), doubt[:, 1:].to(logits.dtype)], 1)


def chain() -> EnumeratedTokens:
    """Three tokens that nearly always repeat the one before, as points on a circle."""
    start = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    step = 0.01 + 0.97 * torch.eye(V, dtype=torch.float64)
    turn = torch.arange(V, dtype=torch.float64) * (2 * math.pi / V)
    return EnumeratedTokens(
        schedule=Cosine(),
        probabilities=torch.einsum("a,ab,bc->abc", start, step, step),
        embeddings=math.sqrt(2 * math.log(V)) * torch.stack([turn.cos(), turn.sin()], 1),
    )


ORACLE = Oracle(chain())


def excess(levels: Tensor | None, path: Path, seed: int = 0) -> tuple[float, float, Output]:
    """Mean of the bound minus -log p(X), its standard error, and what was measured."""
    draws, distribution = generator(seed), ORACLE.distribution
    tokens = distribution.sample(SEQUENCES, draws)
    batch = Batch(
        tokens=tokens,
        present=torch.ones_like(tokens, dtype=torch.bool),
        prompt=torch.zeros(SEQUENCES, dtype=torch.int64),
        end=torch.full((SEQUENCES,), N),
    )
    chance, part = Chance(draws, SEQUENCES), as_part(None, batch, batch.present)
    out = measure(ORACLE, batch, batch.present, levels, path, chance, part, 8)
    samples = out.bound.sum(1) + distribution.log_probabilities[distribution.index(tokens)]
    return samples.mean().item(), samples.std().item() / SEQUENCES**0.5, out


LEVELS = {
    "words": torch.zeros(SEQUENCES, N, dtype=torch.float64),
    "fixed": torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64).expand(SEQUENCES, N),
    "falling": torch.tensor([1.0, 0.05, 0.4], dtype=torch.float64).expand(SEQUENCES, N),
    "noise": torch.ones(SEQUENCES, N, dtype=torch.float64),
    "random": torch.rand(SEQUENCES, N, generator=generator(2), dtype=torch.float64),
    "adaptive": None,
}


@pytest.mark.parametrize("path", [early_stop, late_start, full], ids=str)
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_b_1_under_ideal_predictors_the_bound_is_the_entropy(levels, path):
    mean, error, out = excess(levels, path)
    assert abs(mean) <= 4 * error + 1e-9
    assert error < 0.02
    if levels is None:
        assert (out.levels[:, 1:].std(0) > 0.2).all(), "levels that are all alike would make this test empty"


@pytest.mark.parametrize("path", [early_stop, late_start, full], ids=str)
def test_b_1_noise_that_forgets_the_sketch_leaks_through_adaptive_levels(path, monkeypatch):
    monkeypatch.setattr(ORACLE.schedule, "bridge", lambda noise, levels, level, fresh: fresh)
    mean, error, _ = excess(None, path)
    assert mean < -6 * error
    mean, error, _ = excess(LEVELS["random"], path)
    assert abs(mean) <= 4 * error, "of levels that do not depend on the noise it is a bound all the same"
