"""Bits are conserved: how the nats of a sequence split between the sketch and the flow.

For levels t and ideal predictors the three parts of the bound are

    sketch          I(X; Z_t)                       by the chain rule,
    flow            H(X | Z_t) − H(X | Z_{t_min})   by the I-MMSE identity (Guo, Shamai and Verdú 2005),
    reconstruction  H(X | Z_{t_min}),

and their sum is H(X) for every t. Here the ideal predictors are computed by enumerating all sequences, so that the identity can
be looked at without a network; `split_model_bits` gives the same figures for a model on a batch.

B sequences, N tokens, V entries, D latent dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from evo.core.answers import outside
from evo.core.contract import as_count, check_called, check_path
from evo.schedules import Path, Schedule, early_stop

LevelRule = Callable[[Tensor, Tensor], Tensor]
"""Levels chosen on the way: `rule(latents (B, i, D), levels (B, i))` is the level (B,) of token i, from what precedes it."""


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo mean with its standard error, both in nats."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, samples: Tensor) -> Estimate:
        """From independent samples (B,). Raises ValueError for fewer than two."""
        if samples.dim() != 1 or len(samples) < 2:
            raise ValueError(
                f"an estimate needs two or more independent samples (B,), got shape {tuple(samples.shape)}"
            )
        samples = samples.double()
        return cls(samples.mean().item(), samples.std().item() / len(samples) ** 0.5)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.standard_error:.4f}"


@dataclass(frozen=True, kw_only=True)
class BitSplit:
    """The bound on −log p(X) and its three parts, in nats per sequence."""

    sketch: Estimate
    flow: Estimate
    reconstruction: Estimate
    total: Estimate


@dataclass(frozen=True, kw_only=True)
class ConservedBits(BitSplit):
    """A split under ideal predictors, beside the entropy that it must sum to.

    Attributes:
        entropy: H(X).
        excess: total − H(X), estimated as the mean of the bound of X minus −log p(X): the spread of −log p(X) cancels, and
            what is left is the noise of the identity itself.
    """

    entropy: float
    excess: Estimate


@dataclass(frozen=True, kw_only=True)
class EnumeratedTokens:
    """A distribution over sequences of tokens small enough to be listed, with every posterior in closed form.

    Below level `schedule.t_min` a token is a realised word: its latent is an embedding and leaves no doubt.

    Args:
        probabilities: one axis of length V per token, (V,) * N; they sum to one.
        embeddings: e(v), (V, D).

    Raises:
        ValueError: for shapes that do not fit, or probabilities that are none.
    """

    schedule: Schedule
    probabilities: Tensor
    embeddings: Tensor

    def __post_init__(self) -> None:
        probabilities, embeddings = self.probabilities, self.embeddings
        if embeddings.dim() != 2 or set(probabilities.shape) != {len(embeddings)}:
            raise ValueError(
                f"probabilities need one axis per token, each as long as embeddings (V, D) has rows; "
                f"got shapes {tuple(probabilities.shape)} and {tuple(embeddings.shape)}"
            )
        total, least = probabilities.sum().item(), probabilities.min().item()
        if not (abs(total - 1) < 1e-5 and least >= 0):
            raise ValueError(f"probabilities must be non-negative and sum to 1, got minimum {least} and sum {total}")

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.embeddings)

    @property
    def length(self) -> int:
        """N."""
        return self.probabilities.dim()

    @property
    def entropy(self) -> float:
        """H(X) in nats."""
        return torch.special.entr(self.probabilities).sum().item()

    @cached_property
    def log_probabilities(self) -> Tensor:
        """Log p of every sequence, (V**N,); the last token varies fastest."""
        return self.probabilities.log().flatten()

    def index(self, tokens: Tensor) -> Tensor:
        """Which of the V**N sequences each is: (B, N) -> (B,)."""
        place = self.vocab_size ** torch.arange(self.length - 1, -1, -1, device=tokens.device)
        return (tokens * place).sum(-1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Tokens (count, N)."""
        rows = torch.multinomial(self.probabilities.flatten(), count, replacement=True, generator=generator)
        return torch.stack(torch.unravel_index(rows, self.probabilities.shape), dim=-1)

    def evidence(self, latents: Tensor, level: Tensor) -> Tensor:
        """What each latent says of its own token: log N(z; s·e(v), n²) up to a constant in v, (B, N, V).

        For a realised word it is 0 at the word and −inf elsewhere.
        """
        realised = level < self.schedule.t_min
        noisy = torch.where(realised, 1.0, level)
        signal, variance = self.schedule.signal(noisy)[..., None], self.schedule.noise(noisy)[..., None] ** 2
        energy = self.embeddings.square().sum(-1) / 2
        gaussian = (signal * (latents @ self.embeddings.T) - signal**2 * energy) / variance
        word = (latents @ self.embeddings.T - energy).argmax(-1, keepdim=True)
        certain = torch.full_like(gaussian, -torch.inf).scatter(-1, word, 0.0)
        return torch.where(realised[..., None], certain, gaussian)

    def context_log_probs(self, evidence: Tensor) -> Tensor:
        """Log π: row i is log p(x_i | z_<i), (B, N, V), from the evidence (B, N, V) of every token."""
        joint, rows = self.log_probabilities.expand(len(evidence), -1), []
        for i in range(self.length):
            rows.append(self._by_token(joint, i).logsumexp(dim=(1, 3)).log_softmax(-1))
            joint = self._conditioned(joint, i, evidence)
        return torch.stack(rows, dim=1)

    def posterior(self, evidence: Tensor) -> Tensor:
        """Log p(X | z) of every sequence, (B, V**N)."""
        joint = self.log_probabilities.expand(len(evidence), -1)
        for i in range(self.length):
            joint = self._conditioned(joint, i, evidence)
        return joint.log_softmax(-1)

    def denoised_of(self, posterior: Tensor) -> Tensor:
        """x̂ = E[e(x_i) | z], (B, N, D), from `posterior`."""
        probabilities = posterior.exp()
        marginals = [self._by_token(probabilities, i).sum(dim=(1, 3)) for i in range(self.length)]
        return torch.stack(marginals, dim=1) @ self.embeddings

    def denoised(self, latents: Tensor, level: Tensor) -> Tensor:
        """The ideal denoiser: latents (B, N, D) at levels (B, N) -> x̂ (B, N, D)."""
        return self.denoised_of(self.posterior(self.evidence(latents, level)))

    def score(self, latents: Tensor, level: Tensor) -> Tensor:
        """∇ log p(z), (B, N, D), at levels of t_min and above."""
        noise = self.schedule.noise_from_denoised(latents, self.denoised(latents, level), level)
        return self.schedule.score_from_noise(noise, level)

    def _by_token(self, joint: Tensor, i: int) -> Tensor:
        """(B, V**N) as (B, those before, V, those after): the axis of token i by itself."""
        return joint.reshape(len(joint), self.vocab_size**i, self.vocab_size, -1)

    def _conditioned(self, joint: Tensor, i: int, evidence: Tensor) -> Tensor:
        return (self._by_token(joint, i) + evidence[:, i, None, :, None]).flatten(1)


@torch.no_grad()
def split_bits(
    distribution: EnumeratedTokens,
    levels: Tensor | LevelRule | float,
    *,
    generator: torch.Generator,
    path: Path = early_stop,
    sequences: int = 4096,
    clock_values: int = 32,
) -> ConservedBits:
    """Split H(X) at `levels`: one for all, (N,), (sequences, N), or a rule that computes them from z_<i.

    The flow integral is taken at `clock_values` stratified values of the clock per sequence, so that every sequence is an
    independent, unbiased sample of the bound. The latent at τ continues the latent at t (`schedule.bridge`), without which levels
    that are computed from latents leak what they know of the noise.

    Raises ValueError or TypeError for levels that lie outside [0, 1] or have another shape, no clock value, or fewer than 2 sequences.
    """
    clock_values, sequences = as_count("clock_values", clock_values), as_count("sequences", sequences)
    check_path(path)
    if sequences < 2:
        raise ValueError(f"sequences is {sequences}; a standard error needs at least 2")
    schedule, tokens = distribution.schedule, distribution.sample(sequences, generator)
    clean = distribution.embeddings[tokens]

    def fresh() -> Tensor:
        return torch.randn(clean.shape, dtype=clean.dtype, device=clean.device, generator=generator)

    noise = fresh()
    levels = _levels(distribution, levels, clean, noise)
    live = levels > schedule.t_min

    def evidence_at(level: Tensor, noise: Tensor) -> Tensor:
        latents = torch.where(live[..., None], schedule.noised(clean, noise, level), clean)
        return distribution.evidence(latents, torch.where(live, level, 0.0))

    def posterior_at(level: Tensor) -> Tensor:
        return distribution.posterior(evidence_at(level, schedule.bridge(noise, levels, level, fresh())))

    def nats(log_probs: Tensor) -> Tensor:
        return -log_probs.gather(-1, tokens[..., None])[..., 0]

    evidence = evidence_at(levels, noise)
    context = distribution.context_log_probs(evidence)
    still_open = torch.where(live, nats((context + evidence).log_softmax(-1)), 0.0)
    sketch = (nats(context) - still_open).sum(-1)

    flow, offset = (
        torch.zeros_like(sketch),
        torch.rand(sequences, generator=generator, dtype=clean.dtype, device=clean.device),
    )
    for stratum in range(clock_values):
        level, rate = path.at(levels, (stratum + offset) / clock_values, schedule.t_min)
        error = (clean - distribution.denoised_of(posterior_at(level))).square().sum(-1)
        flow += torch.where(live, -0.5 * schedule.d_snr(level) * rate * error, 0.0).sum(-1) / clock_values

    row = distribution.index(tokens)
    reconstruction = -posterior_at(levels.clamp(max=schedule.t_min)).gather(-1, row[:, None])[:, 0]
    total = sketch + flow + reconstruction
    return ConservedBits(
        sketch=Estimate.of(sketch),
        flow=Estimate.of(flow),
        reconstruction=Estimate.of(reconstruction),
        total=Estimate.of(total),
        entropy=distribution.entropy,
        excess=Estimate.of(total + distribution.log_probabilities[row]),
    )


def _levels(distribution: EnumeratedTokens, levels: Tensor | LevelRule | float, clean: Tensor, noise: Tensor) -> Tensor:
    """Levels (B, N) of every sequence; a rule is walked position by position, over the latents it has led to so far."""
    if isinstance(levels, (Tensor, float, int)):
        return _checked(torch.as_tensor(levels), clean.shape[:-1]).to(clean).expand(clean.shape[:-1])
    check_called(
        "levels", levels, "levels(latents, levels)", "lambda latents, levels: ..., beside a number and a tensor"
    )
    schedule, chosen, latents = distribution.schedule, clean[:, :0, 0], clean[:, :0]
    for i in range(distribution.length):
        level = _checked(levels(latents, chosen), clean.shape[:1])[:, None]
        here = slice(i, i + 1)
        noised = schedule.noised(clean[:, here], noise[:, here], level)
        latent = torch.where((level > schedule.t_min)[..., None], noised, clean[:, here])
        chosen, latents = torch.cat([chosen, level], dim=1), torch.cat([latents, latent], dim=1)
    return chosen


def _checked(levels: Tensor, shape: torch.Size) -> Tensor:
    """Levels that broadcast to a shape; raises ValueError for other shapes, or levels outside [0, 1]."""
    if levels.shape not in ((), shape[1:], shape):
        raise ValueError(
            f"levels have shape {tuple(levels.shape)}; needed one number, {tuple(shape[1:])} or {tuple(shape)}"
        )
    if (wrong := outside(levels)).any():
        raise ValueError(
            f"levels must lie in [0, 1] (1 is noise, 0 a realised word), got {levels[wrong][0].item():.6g}"
        )
    return levels


@torch.no_grad()
def split_model_bits(
    model: nn.Module,
    tokens: Tensor,
    levels: Tensor | float | None = None,
    *,
    generator: torch.Generator,
    path: Path = early_stop,
    draws: int = 16,
) -> BitSplit:
    """The same split for a model (an `Evo`) on tokens (B, N), each sequence with `draws` noises and clock values.

    `levels` is None for the levels that the model chooses, one for all, or (B, N). Standard errors are over sequences.

    Raises ValueError for a model in training mode, whose flow bits are not those of the bound, for fewer than 2 sequences, over which
    there is no standard error, and for no draws.
    """
    draws = as_count("draws", draws)
    if model.training:
        raise ValueError(
            "the model is in training mode, where the weight of the flow is capped: call model.eval() first"
        )
    if len(tokens) < 2:
        raise ValueError(f"tokens have {len(tokens)} sequence; a standard error over sequences needs at least 2")
    runs = [model(tokens, levels=levels, path=path, generator=generator) for _ in range(draws)]

    def nats(part: str) -> Estimate:
        return Estimate.of(torch.stack([getattr(run, part).sum(-1) for run in runs]).mean(0))

    return BitSplit(
        sketch=nats("sketch_bits"), flow=nats("flow_bits"), reconstruction=nats("reconstruction"), total=nats("bound")
    )
