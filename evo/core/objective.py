"""The loss that training minimises: one estimate of the bound at one clock value a sequence, and what exploration adds.

B batch, N tokens, V vocabulary, D latent dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from evo.core.bound import Batch, Sketch, clock_values, cross_entropy, standard_normal
from evo.core.clock import ClockDensity
from evo.core.extremes import Extremes
from evo.core.levels import Exploration, random_levels, usage_entropy, with_logistic_noise
from evo.schedules import Path

if TYPE_CHECKING:
    from evo.core.model import Evo


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What training adds to the bound, and how it explores. Nothing of it touches a reported figure.

    Args:
        causal_weight: weight of the causal cross-entropy of a clean first pass, which is then what the head reads; 0 makes the first
            pass a noisy one that nothing is learned from.
        aux_weight: weight w of the auxiliary cross-entropies (1-t) CE(pi, x) + t CE(p(·|z), x), annealed by the training loop.
        label_smoothing: of the auxiliary cross-entropies, in [0, 1).
        entropy_weight: weight of the entropy of the levels used across a sequence, which is rewarded.
        level_price: price of a unit of level, in nats a token.
        weight_cap: the flow integrand's weight is cut here, so that one rare low level cannot drown a batch.
        self_conditioning: share of the sequences, in [0, 1], whose network sees its own earlier estimate, where it takes one.
        exploration: how levels stray from the head's.
        clock: where the flow is measured; each step tells it what it found. None is uniformly.
        extremes: means of the bound at level 0, at the head's levels and at level 1; each step tells it what it found, and while an end
            is better than the head, the head's logits are moved towards it. None leaves the head to the gradient of the bound alone.
    """

    causal_weight: float = 0.0
    aux_weight: float = 1.0
    label_smoothing: float = 0.1
    entropy_weight: float = 0.01
    level_price: float = 0.0
    weight_cap: float = 50.0
    self_conditioning: float = 0.5
    exploration: Exploration = field(default_factory=Exploration)
    clock: ClockDensity | None = None
    extremes: Extremes | None = None

    def __post_init__(self) -> None:
        for name in ("aux_weight", "causal_weight", "entropy_weight", "level_price"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; a weight must be finite")
        if not (
            self.aux_weight >= 0 and self.causal_weight >= 0 and 0 <= self.label_smoothing < 1 and self.weight_cap > 0
        ):
            raise ValueError(
                f"aux_weight {self.aux_weight}, causal_weight {self.causal_weight}, label_smoothing {self.label_smoothing}, "
                f"weight_cap {self.weight_cap}: needed weights of at least 0, label_smoothing in [0, 1), weight_cap > 0"
            )
        if not 0 <= self.self_conditioning <= 1:
            raise ValueError(
                f"self_conditioning is {self.self_conditioning}; it is a share of the sequences, in [0, 1]"
            )


# Made once: torch.compile cannot trace the making of it.
DEFAULT_OBJECTIVE = Objective()


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


def training_step(
    model: Evo,
    batch: Batch,
    scored: Tensor,
    levels: Tensor | None,
    path: Path,
    generator: torch.Generator | None,
    objective: Objective,
    *,
    refined: bool = True,
) -> Output:
    """One estimate of the bound at one clock value a sequence, and the loss.

    `levels=None` explores, see `training_levels`. `refined=False` says that all levels are 0, which spares the flow its pass.
    """
    noise = standard_normal((*batch.tokens.shape, model.latent_space.dim), model.bos, generator)
    count, free = scored.sum().clamp(min=1), scored & batch.free
    chosen = None
    if levels is None:
        chosen = training_levels(model, batch, noise, objective, generator)
        levels = chosen.levels
    sketch = Sketch(model, batch, levels, noise)
    bits, causal = sketch.bits()
    flow = reconstruction = torch.zeros_like(bits)
    smoothing = objective.label_smoothing
    spoken = cross_entropy(sketch.context_log_probs, batch.tokens, smoothing) if smoothing else causal
    if refined:
        clock = clock_values(len(noise), noise, generator)
        found = sketch.flow_bits(
            path,
            clock,
            generator,
            density=objective.clock,
            weight_cap=objective.weight_cap,
            self_conditioning=objective.self_conditioning,
        )
        if objective.clock is not None:
            objective.clock.update(found.remaining, (found.integrand * scored).sum(1))
        flow = found.bits
        reconstruction = sketch.reconstruction(generator, network=False)
        # Weighted by how much each half has to say of a token; the levels are not to be learned from the weights.
        own = cross_entropy(found.denoised.log_probs, batch.tokens, smoothing)
        spoken = torch.lerp(spoken, own, sketch.levels.detach())

    bound = bits + flow + reconstruction
    loss = (bound * scored).sum() / count
    if objective.aux_weight:
        loss = loss + objective.aux_weight * (spoken * scored).sum() / count
    if objective.entropy_weight:
        loss = loss - objective.entropy_weight * usage_entropy(levels, batch.free).mean()
    if objective.level_price:
        loss = loss + objective.level_price * (levels * free).sum() / count
    if chosen is not None:
        if chosen.causal is not None:
            loss = loss + objective.causal_weight * (chosen.causal * scored).sum() / count
        if objective.extremes is not None:
            learned = len(levels) - len(chosen.head)
            cost = (bound + objective.level_price * sketch.levels).detach()
            _compare(objective.extremes, cost, sketch.levels, free, learned, chosen.causal)
            logits, number = chosen.head.logit(eps=1e-4), scored[learned:].sum().clamp(min=1)
            loss = loss + objective.extremes.slope().to(loss.dtype) * (logits * free[learned:]).sum() / number
    return Output(loss=loss, sketch_bits=bits, flow_bits=flow, reconstruction=reconstruction, levels=sketch.levels)


class Chosen(NamedTuple):
    """Levels to train on.

    Attributes:
        levels: (B, N), random ones first, then those of the head with noise.
        head: what the head itself says of the latter, (learners, N).
        causal: cross-entropy of the clean first pass, nats, (B, N); None where there was no such pass.
    """

    levels: Tensor
    head: Tensor
    causal: Tensor | None


def training_levels(
    model: Evo, batch: Batch, noise: Tensor, objective: Objective, generator: torch.Generator | None
) -> Chosen:
    """Levels to train on: random ones for a share of the sequences, for the others, the learners, those of the head with noise.

    The head reads a first pass, and the levels have a gradient to the head alone. The pass is made over the learners at exploratory
    levels, without a gradient; or, where the objective weighs causal cross-entropy, over everything at level 0, and is then scored.
    """
    explored = random_levels(batch.tokens.shape, generator, noise)
    learned = round(objective.exploration.share * len(explored))
    hidden = logits = causal = None
    if objective.causal_weight:
        first = Sketch(model, batch, torch.zeros_like(explored), noise)
        causal = cross_entropy(first.context_log_probs, batch.tokens)
        hidden, logits = first.hidden[learned:].detach(), first.context_logits[learned:].detach()
    elif learned < len(explored):
        with torch.no_grad():
            first = Sketch(model, batch.take(slice(learned, None)), explored[learned:], noise[learned:])
        hidden, logits = first.hidden, first.context_logits
    if learned == len(explored):
        return Chosen(explored, explored[learned:], causal)
    head = model.timestep_head(hidden, logits)
    levels = with_logistic_noise(head, objective.exploration.noise, generator)
    return Chosen(torch.cat([explored[:learned], levels]), head, causal)


def _compare(
    extremes: Extremes, cost: Tensor, levels: Tensor, free: Tensor, learned: int, causal: Tensor | None
) -> None:
    """Tell what tokens cost, nats (B, N), at the head's levels (from row `learned` on), at level 0 and at level 1.

    Level 1 is found among the random levels; level 0 too, or, better, of the very sequences of the head, in the clean first pass.
    """
    head, ends = _mean(cost[learned:], free[learned:]), []
    for level in (0, 1):
        constant = ((levels[:learned] == level) | ~free[:learned]).all(1, keepdim=True)
        ends.append(_mean(cost[:learned], free[:learned] & constant))
    if causal is not None:
        ends[0] = _mean(causal[learned:].detach(), free[learned:])
    found, tokens = torch.stack([nats for nats, _ in ends]), torch.stack([count for _, count in ends])
    extremes.update(head[0].expand(2), found, torch.minimum(tokens, head[1]))


def _mean(nats: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Nats per token counted (NaN for none), and how many these are."""
    count = counted.sum()
    return (nats * counted).sum() / count, count
