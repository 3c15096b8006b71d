"""The bound on -log p(X), in its three parts.

    sketch          CE(pi, x) - CE(pi + l, x)                        what the causal half codes, up to the level t of each token
    flow            1/2 int -SNR'(tau) (-dtau/dc) E|e(x) - x̂|² dc    what the flow codes, from t down to t_min
    reconstruction  CE(p(·|z at t_min), x)                           what is left to be said there

A token whose level is at most t_min is realised at once: CE(pi, x) and nothing else.

B batch, N tokens, V vocabulary, D latent dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evo.core.answers import levels_of, logits_of, outside, wrong_level
from evo.core.chance import Chance
from evo.core.clock import ClockDensity
from evo.core.denoiser import Denoised, Denoiser
from evo.core.documents import Documents
from evo.core.order import Order
from evo.core.part import Subset
from evo.schedules import Path

if TYPE_CHECKING:
    from evo.core.model import Evo


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token sequences and what is known of them.

    Attributes:
        tokens: ids, (B, N).
        present: bool (B, N), False behind the end of a sequence.
        prompt: (B,) how many tokens of each are prompt: level 0, seeing only what precedes them.
        end: (B,) how many tokens each has.
        order: in which they are read, and how many of them are suffix: level 0, seeing prompt and suffix only, and coded by nobody. None
            where no sequence has a suffix.
        documents: of which several may share a sequence without seeing each other; None is one a sequence.
    """

    tokens: Tensor
    present: Tensor
    prompt: Tensor
    end: Tensor
    order: Order | None = None
    documents: Documents | None = None

    def take(self, rows: Tensor | slice) -> Batch:
        """The sequences of the given rows."""
        return Batch(
            tokens=self.tokens[rows],
            present=self.present[rows],
            prompt=self.prompt[rows],
            end=self.end[rows],
            order=None if self.order is None else self.order.take(rows),
            documents=None if self.documents is None else self.documents.take(rows),
        )

    @property
    def coded(self) -> Tensor:
        """Bool (B, N): present and not suffix, the tokens that have bits."""
        if self.order is None:
            return self.present
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < (self.end - self.order.suffix)[:, None]

    @property
    def free(self) -> Tensor:
        """Bool (B, N): neither absent nor context, the tokens whose level is not 0 from the outset."""
        return self.coded & (torch.arange(self.tokens.shape[1], device=self.tokens.device) >= self.prompt[:, None])


def cross_entropy(log_probs: Tensor, tokens: Tensor, smoothing: float = 0.0) -> Tensor:
    """The cross-entropy in nats of log-probabilities (B, N, V) against tokens (B, N), a share of them smoothed over all V: (B, N)."""
    nll = -log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.lerp(nll, -log_probs.mean(-1), smoothing) if smoothing else nll


class Flow(NamedTuple):
    """The flow of a batch, measured at one value of the clock a sequence.

    Attributes:
        bits: an estimate of the integral, nats, (B, N).
        integrand: nats per unit of clock, (B, N), without gradient.
        remaining: how much of the clock was left, (B,).
        denoised: the state behind it.
    """

    bits: Tensor
    integrand: Tensor
    remaining: Tensor
    denoised: Denoised


@dataclass(frozen=True, eq=False, kw_only=True)
class Waiting:
    """What of each sequence is sketched in parallel: the tokens behind the first `known`, while nothing of them is known.

    Attributes:
        known: (B,) int64, at least the prompt; as many as there are tokens where none waits.
        noise: standard normal, (B, N, D), what the network sees in the place of those that wait. It is none of the tokens' own noise: what
            has seen that of a token knows, beside its latent, which token it is, and the sum of the parts would be no bound.
    """

    known: Tensor
    noise: Tensor

    def take(self, rows: Tensor | slice) -> Waiting:
        """That of the given sequences."""
        return Waiting(known=self.known[rows], noise=self.noise[rows])


class Sketch:
    """One sketch of a batch, from which the three parts of the bound are read.

    Its noise is drawn once: a latent at a lower level continues the latent at t (the bridge), which is what keeps the sum a bound
    when levels are computed from latents.

    Args:
        model: the model.
        batch: the tokens.
        levels: t, (B, N).
        noise: standard normal, (B, N, D).
        waiting: what is sketched in parallel; None is nothing.
    """

    def __init__(self, model: Evo, batch: Batch, levels: Tensor, noise: Tensor, waiting: Waiting | None = None) -> None:
        self.model, self.batch, self.noise, self.schedule = model, batch, noise, model.schedule
        self.waiting = waiting
        self.denoiser = Denoiser.of(model.latent_space, model.schedule)
        self.clean = F.embedding(batch.tokens, self.denoiser.embeddings).to(noise.dtype)
        self.levels = realised_below(levels, self.schedule.t_min, batch)
        self.live = self.levels > 0
        self.latents = self._noised(noise, self.levels)
        seen, level, known = self.latents, self.levels, None
        if waiting is not None:
            known = waiting.known
            waits = batch.free & (torch.arange(levels.shape[1], device=levels.device) >= known[:, None])
            pure = self.schedule.noise(torch.ones_like(level)).unsqueeze(-1) * waiting.noise
            seen, level = torch.where(waits.unsqueeze(-1), pure, seen), torch.where(waits, 1.0, level)
        self.hidden = model.sketch(seen, level, known=known, order=batch.order, documents=batch.documents)
        self.context_logits = logits_of(model.readout, self.hidden, self.denoiser.embeddings).to(noise.dtype)
        self._context_log_probs: Tensor | None = None

    def again(self, rows: Tensor | slice, levels: Tensor) -> Sketch:
        """One of the given sequences alone, at other levels, with the same noise."""
        waiting = None if self.waiting is None else self.waiting.take(rows)
        return Sketch(self.model, self.batch.take(rows), levels, self.noise[rows], waiting)

    @property
    def context_log_probs(self) -> Tensor:
        """What the causal half says, in nats, (B, N, V); a sketch made only to ask the head does not need it."""
        # Not a `cached_property`: before Python 3.12 it takes a lock, which torch.compile cannot trace.
        found = self._context_log_probs
        if found is None:
            found = self._context_log_probs = self.context_logits.log_softmax(-1)
        return found

    def bits(self) -> tuple[Tensor, Tensor]:
        """Sketch bits, and the causal cross-entropy CE(pi, x) they are a part of: nats, (B, N) each."""
        causal = cross_entropy(self.context_log_probs, self.batch.tokens)
        posterior = self.denoiser.log_posterior(self.context_logits, self.latents, self.levels)
        left = torch.where(self.live, cross_entropy(posterior, self.batch.tokens), 0.0)
        return (causal - left) * self.batch.coded, causal * self.batch.coded

    def flow_bits(
        self,
        path: Path,
        clock: Tensor,
        chance: Chance,
        *,
        density: ClockDensity | None = None,
        weight_cap: float | None = None,
        estimated: Subset | None = None,
        gain: float = 1.0,
    ) -> Flow:
        """The flow measured at one clock value a sequence.

        Args:
            path: how levels fall.
            clock: (B,) uniform in [0, 1), where on the stretch of the clock in which any token of the sequence moves.
            chance: draws the noise.
            density: turns `clock` into values drawn where the integrand lives; None leaves them uniform.
            weight_cap: largest weight of an error; None is no limit, which alone is unbiased.
            estimated: the sequences that are refined with an estimate, if the network takes one; None is all.
            gain: of the gradient that reaches the levels from here.
        """
        fixed = self.levels.detach()
        levels = self.levels if gain == 1 else fixed + gain * (self.levels - fixed)
        begin, end = (x.detach() for x in path.stretch(levels, self.schedule.t_min))
        length = end - begin
        remaining, spread = (length * (1 - clock), length) if density is None else density(1 - clock, length)
        level, rate = path.at(levels, end - remaining, self.schedule.t_min)
        level = torch.where(self.live, level, 0.0)
        denoised = self._refine(self._bridged(levels, level, chance), level, estimated)
        rate = -0.5 * self.schedule.d_snr(level.clamp(min=self.schedule.t_min)) * rate
        weight = rate * spread.unsqueeze(-1)
        if weight_cap is not None:
            weight = weight.clamp(max=weight_cap)
        error = torch.where(self.live, (self.clean - denoised.latents).square().sum(-1), 0.0)
        return Flow(bits=weight * error, integrand=(rate * error).detach(), remaining=remaining, denoised=denoised)

    def reconstruction(self, chance: Chance, *, network: bool) -> Tensor:
        """CE(p(·|z at t_min), x): nats, (B, N). Of the network, or (as valid, and without a pass) of the evidence alone."""
        level = self.live * torch.full_like(self.levels, self.schedule.t_min)
        latents = self._bridged(self.levels, level, chance)
        if network:
            log_probs = self._refine(latents, level).log_probs
        else:
            log_probs = self.denoiser.log_posterior(None, latents, level)
        return torch.where(self.live, cross_entropy(log_probs, self.batch.tokens), 0.0)

    def _noised(self, noise: Tensor, level: Tensor) -> Tensor:
        """Latents at a level; where it is 0, the embeddings themselves, bit for bit."""
        return torch.where((level > 0).unsqueeze(-1), self.schedule.noised(self.clean, noise, level), self.clean)

    def _bridged(self, levels: Tensor, level: Tensor, chance: Chance) -> Tensor:
        fresh = chance.normal(*self.noise.shape[1:], like=self.noise)
        return self._noised(self.schedule.bridge(self.noise, levels, level, fresh), level)

    def _refine(self, latents: Tensor, level: Tensor, estimated: Subset | None = None) -> Denoised:
        if not self.model.self_conditioned:
            return self._denoise(self.batch, latents, level)
        with torch.no_grad():
            if estimated is None:
                estimate = self._denoise(self.batch, latents, level).latents
            else:
                estimate = torch.zeros_like(latents)
                if estimated.whole:
                    rows = estimated.visited(latents.device)
                    first = self._denoise(self.batch.take(rows), latents[rows], level[rows]).latents
                    estimate[estimated.rows(latents.device)] = first[: len(estimated.places)]
        return self._denoise(self.batch, latents, level, estimate)

    def _denoise(self, batch: Batch, latents: Tensor, level: Tensor, estimate: Tensor | None = None) -> Denoised:
        given = {} if estimate is None else {"estimate": estimate}
        hidden = self.model.refine(
            latents, level, prompt=batch.prompt, end=batch.end, order=batch.order, documents=batch.documents, **given
        )
        return self.denoiser(logits_of(self.model.readout, hidden, self.denoiser.embeddings), latents, level)


def realised_below(levels: Tensor, t_min: float, batch: Batch) -> Tensor:
    """Levels (B, N) with exact zeros where a token is context or absent, or its level is at most t_min."""
    return torch.where(batch.free & (levels > t_min), levels, 0.0)


@torch.no_grad()
def learned_levels(model: Evo, batch: Batch, noise: Tensor, snap: float = 0.0) -> Tensor:
    """The levels that a position-by-position sketch with this noise would choose, (B, N), found in parallel.

    t_i depends on z_<i, so after round k the first k levels are exact; rounds are repeated until nothing changes, which
    takes few in practice and N at most. Levels below `snap` become 0.

    Raises:
        ValueError: for a head that gives no levels in [0, 1], of logits that are finite.
    """
    levels = noise.new_zeros(batch.tokens.shape)
    tolerance = 16 * torch.finfo(noise.dtype).eps
    for _ in range(batch.tokens.shape[1]):
        sketch = Sketch(model, batch, levels, noise)
        asked = levels_of(model.timestep_head, sketch.hidden, sketch.context_logits)
        proposed = realised_below(torch.where(asked < snap, 0.0, asked), model.schedule.t_min, batch)
        # One number for the host to wait for: no change that is NaN is small.
        wrong = outside(asked) & batch.free
        change = torch.where(wrong.any(), torch.nan, (proposed - levels).abs().max()).item()
        if change <= tolerance:
            return proposed
        if math.isnan(change):
            if sketch.context_logits.isfinite().all():
                raise wrong_level(asked[wrong][0].item())
            return proposed  # the bound of such weights is NaN, whatever the levels
        levels = proposed
    return levels
