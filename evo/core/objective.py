"""The bound on -log p(X), in its three parts, and the loss that training minimises.

    sketch          CE(pi, x) - CE(pi + l, x)                        what the causal half codes, up to the level t of each token
    flow            1/2 int -SNR'(tau) (-dtau/dc) E|e(x) - x̂|² dc    what the flow codes, from t down to t_min
    reconstruction  CE(p(·|z at t_min), x)                           what is left to be said there

A token whose level is at most t_min is realised at once: CE(pi, x) and nothing else.

B batch, N tokens, V vocabulary, D latent dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from evo.core.denoiser import Denoised, Denoiser
from evo.core.levels import Exploration, random_levels, usage_entropy, with_logistic_noise
from evo.schedules import Path

if TYPE_CHECKING:
    from evo.core.model import Evo


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What training adds to the bound, and how it explores. Nothing of it touches a reported figure.

    Args:
        aux_weight: weight w of the auxiliary cross-entropies (1-t) CE(pi, x) + t CE(p(·|z), x), annealed by the training loop.
        label_smoothing: of the auxiliary cross-entropies, in [0, 1).
        entropy_weight: weight of the entropy of the levels used across a sequence, which is rewarded.
        level_price: price of a unit of level, in nats a token.
        weight_cap: the flow integrand's weight is cut here, so that one rare low level cannot drown a batch.
        exploration: how levels stray from the head's.
    """

    aux_weight: float = 1.0
    label_smoothing: float = 0.1
    entropy_weight: float = 0.01
    level_price: float = 0.0
    weight_cap: float = 50.0
    exploration: Exploration = field(default_factory=Exploration)

    def __post_init__(self) -> None:
        for name in ("aux_weight", "entropy_weight", "level_price"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; a weight must be finite")
        if not (self.aux_weight >= 0 and 0 <= self.label_smoothing < 1 and self.weight_cap > 0):
            raise ValueError(
                f"aux_weight {self.aux_weight}, label_smoothing {self.label_smoothing}, weight_cap {self.weight_cap}: "
                "needed aux_weight >= 0, label_smoothing in [0, 1), weight_cap > 0"
            )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token sequences and what is known of them.

    Attributes:
        tokens: ids, (B, N).
        present: bool (B, N), False behind the end of a sequence.
        prompt: (B,) how many tokens of each are prompt: level 0, seeing only what precedes them.
        end: (B,) how many tokens each has.
    """

    tokens: Tensor
    present: Tensor
    prompt: Tensor
    end: Tensor

    @property
    def free(self) -> Tensor:
        """Bool (B, N): present and not prompt, the tokens whose level is not 0 from the outset."""
        return self.present & (torch.arange(self.tokens.shape[1], device=self.tokens.device) >= self.prompt[:, None])


@dataclass(frozen=True, kw_only=True)
class Output:
    """What `Evo.forward` returns. Bits are in nats, (B, N), unreduced, zero for absent tokens.

    Attributes:
        loss: scalar, the mean over scored tokens of the bound and what the objective adds to it.
        sketch_bits, flow_bits, reconstruction: the three parts of the bound.
        levels: (B, N) the levels used.
    """

    loss: Tensor
    sketch_bits: Tensor
    flow_bits: Tensor
    reconstruction: Tensor
    levels: Tensor

    @property
    def bound(self) -> Tensor:
        """The bound on -log p of each token, (B, N), in nats."""
        return self.sketch_bits + self.flow_bits + self.reconstruction


def cross_entropy(log_probs: Tensor, tokens: Tensor, smoothing: float = 0.0) -> Tensor:
    """The cross-entropy in nats of log-probabilities (B, N, V) against tokens (B, N), a share of them smoothed over all V: (B, N)."""
    nll = -log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.lerp(nll, -log_probs.mean(-1), smoothing) if smoothing else nll


class Sketch:
    """One sketch of a batch, from which the three parts of the bound are read.

    Its noise is drawn once: a latent at a lower level continues the latent at t (the bridge), which is what keeps the sum a bound
    when levels are computed from latents.

    Args:
        model: the model.
        batch: the tokens.
        levels: t, (B, N).
        noise: standard normal, (B, N, D).
    """

    def __init__(self, model: Evo, batch: Batch, levels: Tensor, noise: Tensor) -> None:
        self.model, self.batch, self.noise, self.schedule = model, batch, noise, model.schedule
        self.denoiser = Denoiser.of(model.latent_space, model.schedule)
        self.clean = F.embedding(batch.tokens, self.denoiser.embeddings).to(noise.dtype)
        self.levels = realised_below(levels, self.schedule.t_min, batch)
        self.live = self.levels > 0
        self.latents = self._noised(noise, self.levels)
        self.hidden = model.sketch(self.latents, self.levels)
        self.context_logits = model.readout(self.hidden, self.denoiser.embeddings).to(noise.dtype)

    @cached_property
    def context_log_probs(self) -> Tensor:
        """What the causal half says, in nats, (B, N, V); a sketch made only to ask the head does not need it."""
        return self.context_logits.log_softmax(-1)

    def bits(self) -> tuple[Tensor, Tensor]:
        """Sketch bits, and the causal cross-entropy CE(pi, x) they are a part of: nats, (B, N) each."""
        causal = cross_entropy(self.context_log_probs, self.batch.tokens)
        posterior = self.denoiser.log_posterior(self.context_logits, self.latents, self.levels)
        left = torch.where(self.live, cross_entropy(posterior, self.batch.tokens), 0.0)
        return (causal - left) * self.batch.present, causal * self.batch.present

    def flow_bits(
        self, path: Path, clock: Tensor, generator: torch.Generator | None, weight_cap: float | None = None
    ) -> tuple[Tensor, Denoised]:
        """The integrand of the flow at one clock value a sequence, (B,) in [0, 1]: nats, (B, N), and the denoised state behind it.

        The clock is that of the stretch in which any token of the sequence moves, whose length weights the integrand.
        """
        begin, end = (x.detach() for x in path.stretch(self.levels, self.schedule.t_min))
        length = (end - begin).unsqueeze(-1)
        level, rate = path.at(self.levels, begin + clock * (end - begin), self.schedule.t_min)
        level = torch.where(self.live, level, 0.0)
        denoised = self._refine(self._bridged(level, generator), level)
        weight = -0.5 * self.schedule.d_snr(level.clamp(min=self.schedule.t_min)) * rate * length
        if weight_cap is not None:
            weight = weight.clamp(max=weight_cap)
        error = (self.clean - denoised.latents).square().sum(-1)
        return torch.where(self.live, weight * error, 0.0), denoised

    def reconstruction(self, generator: torch.Generator | None, *, network: bool) -> Tensor:
        """CE(p(·|z at t_min), x): nats, (B, N). Of the network, or (as valid, and without a pass) of the evidence alone."""
        level = self.live * torch.full_like(self.levels, self.schedule.t_min)
        latents = self._bridged(level, generator)
        if network:
            log_probs = self._refine(latents, level).log_probs
        else:
            log_probs = self.denoiser.log_posterior(None, latents, level)
        return torch.where(self.live, cross_entropy(log_probs, self.batch.tokens), 0.0)

    def _noised(self, noise: Tensor, level: Tensor) -> Tensor:
        """Latents at a level; where it is 0, the embeddings themselves, bit for bit."""
        return torch.where((level > 0).unsqueeze(-1), self.schedule.noised(self.clean, noise, level), self.clean)

    def _bridged(self, level: Tensor, generator: torch.Generator | None) -> Tensor:
        fresh = standard_normal(self.noise.shape, self.noise, generator)
        return self._noised(self.schedule.bridge(self.noise, self.levels, level, fresh), level)

    def _refine(self, latents: Tensor, level: Tensor) -> Denoised:
        hidden = self.model.refine(latents, level, prompt=self.batch.prompt, end=self.batch.end)
        return self.denoiser(self.model.readout(hidden, self.denoiser.embeddings), latents, level)


def training_step(
    model: Evo,
    batch: Batch,
    scored: Tensor,
    levels: Tensor | None,
    path: Path,
    generator: torch.Generator | None,
    objective: Objective,
) -> Output:
    """One estimate of the bound at one clock value a sequence, and the loss; `levels=None` explores, see `training_levels`."""
    clean_like = model.latent_space.directions
    noise = standard_normal((*batch.tokens.shape, model.latent_space.dim), clean_like, generator)
    if levels is None:
        levels = training_levels(model, batch, noise, objective, generator)
    sketch = Sketch(model, batch, levels, noise)
    bits, causal = sketch.bits()
    clock = clock_values(len(noise), noise, generator)
    flow, denoised = sketch.flow_bits(path, clock, generator, objective.weight_cap)
    reconstruction = sketch.reconstruction(generator, network=False)

    count = scored.sum().clamp(min=1)
    loss = ((bits + flow + reconstruction) * scored).sum() / count
    if objective.aux_weight:
        smoothing = objective.label_smoothing
        if smoothing:
            causal = cross_entropy(sketch.context_log_probs, batch.tokens, smoothing)
        own = cross_entropy(denoised.log_probs, batch.tokens, smoothing)
        # Weighted by how much each half has to say of a token; the levels are not to be learned from the weights.
        share = sketch.levels.detach()
        loss = loss + objective.aux_weight * (torch.lerp(causal, own, share) * scored).sum() / count
    if objective.entropy_weight:
        loss = loss - objective.entropy_weight * usage_entropy(levels, batch.free).mean()
    if objective.level_price:
        loss = loss + objective.level_price * (levels * (scored & batch.free)).sum() / count
    return Output(loss=loss, sketch_bits=bits, flow_bits=flow, reconstruction=reconstruction, levels=sketch.levels)


def realised_below(levels: Tensor, t_min: float, batch: Batch) -> Tensor:
    """Levels (B, N) with exact zeros where a token is prompt or absent, or its level is at most t_min."""
    return torch.where(batch.free & (levels > t_min), levels, 0.0)


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise on the device of `like`, in its dtype or float32, whichever is wider."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(shape, generator=generator, device=like.device, dtype=dtype)


def clock_values(batch: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """One clock value a sequence, (B,), uniform in [0, 1), low-discrepancy over the batch.

    Steps of the golden ratio from a common random offset: every run of neighbours covers the clock, not only the whole batch.
    """
    offset = torch.rand(1, generator=generator, device=like.device, dtype=like.dtype)
    return (offset + torch.arange(batch, device=like.device, dtype=like.dtype) * 0.6180339887498949) % 1.0


def training_levels(
    model: Evo, batch: Batch, noise: Tensor, objective: Objective, generator: torch.Generator | None
) -> Tensor:
    """Levels (B, N) to train on: random ones for a share of the sequences, for the others those of the head, with noise.

    The head reads a first pass at exploratory levels, which needs no gradient; the levels have one, to the head alone.
    """
    explored = random_levels(batch.tokens.shape, generator, noise)
    chosen = round(objective.exploration.share * len(explored))
    if chosen == len(explored):
        return explored
    rest = slice(chosen, None)
    learners = Batch(
        tokens=batch.tokens[rest], present=batch.present[rest], prompt=batch.prompt[rest], end=batch.end[rest]
    )
    with torch.no_grad():
        first = Sketch(model, learners, explored[rest], noise[rest])
    levels = model.timestep_head(first.hidden, first.context_logits)
    return torch.cat([explored[:chosen], with_logistic_noise(levels, objective.exploration.noise, generator)])


@torch.no_grad()
def learned_levels(model: Evo, batch: Batch, noise: Tensor, snap: float = 0.0) -> Tensor:
    """The levels that a position-by-position sketch with this noise would choose, (B, N), found in parallel.

    t_i depends on z_<i, so after round k the first k levels are exact; rounds are repeated until nothing changes, which
    takes few in practice and N at most. Levels below `snap` become 0.
    """
    levels = noise.new_zeros(batch.tokens.shape)
    tolerance = 16 * torch.finfo(noise.dtype).eps
    for _ in range(batch.tokens.shape[1]):
        sketch = Sketch(model, batch, levels, noise)
        proposed = model.timestep_head(sketch.hidden, sketch.context_logits)
        proposed = realised_below(torch.where(proposed < snap, 0.0, proposed), model.schedule.t_min, batch)
        if (proposed - levels).abs().max() <= tolerance:
            return proposed
        levels = proposed
    return levels
