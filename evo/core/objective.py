"""The loss that training minimises: one estimate of the bound at one clock value a sequence, and what exploration adds.

B batch, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from evo.core.answers import levels_of
from evo.core.bound import Batch, Flow, Sketch, Waiting, cross_entropy
from evo.core.chance import Chance
from evo.core.clock import ClockDensity
from evo.core.extremes import Extremes, pushed
from evo.core.levels import Exploration, random_levels, usage_entropy, with_logistic_noise
from evo.core.part import Kinds, Part, Subset
from evo.core.trials import slope_by_trial
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
        flow_weight: what the network learns from the flow bits is weighted by this, above 0; the head learns from them in full. Their
            gradient is far noisier than that of the cross-entropy CE(p(·|z), x), which has the same minimum.
        teaching: share of the sequences with the head's levels, in [0, 1] and rounded down, from which the head learns. Their
            auxiliary cross-entropies are left out, since these are least where there is no noise and would draw every level to 0; of
            the others they count, and their levels have no gradient.
        entropy_weight: weight of the entropy of the levels used across a sequence, which is rewarded.
        level_price: price of a unit of level, in nats a token.
        trials: weight of what is found by trial, 0 for none: the sequences with the head's levels are measured again, without a gradient,
            each with one level at the end farther away, and the logits of these are moved by the difference. A level at an end has next to
            no gradient in its logit, and would else not learn that for this token the other end has become better.
        weight_cap: the flow integrand's weight is cut here, so that one rare low level cannot drown a batch.
        self_conditioning: share of the sequences, in [0, 1] and rounded down, whose network sees its own earlier estimate, where it
            takes one; of those that explore and of the others alike.
        parallel: share of the sequences, in [0, 1] and rounded down, that are sketched in parallel behind a random place of their window,
            as generation with a `stride` does it; of those that explore and of the others alike.
        exploration: how levels stray from the head's.
        clock: where the flow is measured. None is uniformly.
        extremes: means of the bound at level 0, at the head's levels and at level 1; while an end is better than the head, the head's
            logits are moved towards it. None leaves the head to the gradient of the bound alone.

    `clock` and `extremes` learn from what a step found, `Output.observed`, by `observe`, which is called once a step.
    """

    causal_weight: float = 0.0
    aux_weight: float = 1.0
    label_smoothing: float = 0.0
    flow_weight: float = 1.0
    teaching: float = 1.0
    entropy_weight: float = 0.01
    level_price: float = 0.0
    trials: float = 0.0
    weight_cap: float = 50.0
    self_conditioning: float = 0.5
    parallel: float = 0.0
    exploration: Exploration = field(default_factory=Exploration)
    clock: ClockDensity | None = None
    extremes: Extremes | None = None

    def __post_init__(self) -> None:
        for name in ("aux_weight", "causal_weight", "entropy_weight", "level_price", "trials"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; a weight must be finite")
        if not (
            min(self.aux_weight, self.causal_weight, self.trials) >= 0
            and 0 <= self.label_smoothing < 1
            and self.weight_cap > 0
        ):
            raise ValueError(
                f"aux_weight {self.aux_weight}, causal_weight {self.causal_weight}, trials {self.trials}, label_smoothing "
                f"{self.label_smoothing}, weight_cap {self.weight_cap}: needed weights of at least 0, label_smoothing in [0, 1), "
                "weight_cap > 0"
            )
        if not 0 < self.flow_weight < math.inf:
            raise ValueError(
                f"flow_weight is {self.flow_weight}; it must be finite and above 0: the head learns from the flow in any case"
            )
        for name in ("teaching", "self_conditioning", "parallel"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of the sequences, in [0, 1]")

    def observe(self, observed: Tensor | None) -> None:
        """Take note of what a step found; nothing waits for the device.

        Args:
            observed: `Output.observed` of the whole batch: summed over the parts it was cut into, among passes and among ranks.

        Raises:
            ValueError: for figures that are not those of this objective.
        """
        learning = [each for each in (self.clock, self.extremes) if each is not None]
        sizes = [each.figures for each in learning]
        if (0 if observed is None else observed.numel()) != sum(sizes):
            raise ValueError(
                f"observed has {'nothing' if observed is None else tuple(observed.shape)}, this objective learns from "
                f"({sum(sizes)},) figures: pass the sum of the `observed` that the model returned under it"
            )
        if observed is not None:
            for each, tally in zip(learning, observed.split(sizes), strict=True):
                each.update(tally)


# Made once: torch.compile cannot trace the making of it.
DEFAULT_OBJECTIVE = Objective()


@dataclass(frozen=True, kw_only=True)
class Output:
    """What `Evo.forward` returns. Bits are in nats, (B, N), unreduced, zero for absent tokens.

    Attributes:
        loss: scalar, the mean over scored tokens of the bound and what the objective adds to it. Of a part of a batch: its share in that
            mean over the whole batch, so that losses and gradients of all parts add up (they are summed, not averaged).
        sketch_bits, flow_bits, reconstruction: the three parts of the bound. Of a sequence that is masked (`Exploration.masked`), the
            flow bits are CE(p(·|z), x) at its levels, and nothing is left to be reconstructed.
        levels: (B, N) the levels used.
        observed: (O,) float64 without gradient, what `Objective.observe` learns from; O depends on the objective alone, and figures of
            all parts of a batch add up to those of the batch. None where the objective learns nothing, and in evaluation.
    """

    loss: Tensor
    sketch_bits: Tensor
    flow_bits: Tensor
    reconstruction: Tensor
    levels: Tensor
    observed: Tensor | None = None

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
    chance: Chance,
    part: Part,
    objective: Objective,
    *,
    refined: bool = True,
) -> Output:
    """One estimate of the bound at one clock value a sequence, and the loss: of a part, what it adds to that of the whole batch.

    `levels=None` explores, see `training_levels`. `refined=False` says that all levels are 0, which spares the flow its pass.
    """
    noise = chance.normal(batch.tokens.shape[1], model.latent_space.dim, like=model.bos)
    count, free = part.count, scored & batch.free
    kinds = part.kinds(objective.exploration.share) if levels is None else None
    waiting = None if objective.parallel == 0 else _waiting(batch, noise, part.some(objective.parallel, kinds), chance)
    chosen = None
    if levels is None:
        assert kinds is not None
        chosen = training_levels(model, batch, noise, waiting, objective, chance, kinds)
        levels = chosen.levels
    sketch = Sketch(model, batch, levels, noise, waiting)
    bits, causal = sketch.bits()
    smoothing = objective.label_smoothing
    spoken = cross_entropy(sketch.context_log_probs, batch.tokens, smoothing) if smoothing else causal
    flow = reconstruction = torch.zeros_like(bits)
    refinement = _refinement(sketch, path, chance, part, objective, chosen) if refined else None
    if refinement is not None:
        flow, reconstruction = refinement.flow, refinement.reconstruction
        # Weighted by how much each half has to say of a token; the levels are not to be learned from the weights.
        spoken = torch.lerp(spoken, refinement.spoken, sketch.levels.detach())
        if chosen is not None:
            spoken[chosen.teachers.rows(spoken.device)] = 0.0

    bound = bits + flow + reconstruction
    cost = bound + objective.level_price * sketch.levels
    loss = ((bits + objective.flow_weight * flow + reconstruction) * scored).sum() / count
    if objective.aux_weight:
        loss = loss + objective.aux_weight * (spoken * scored).sum() / count
    if objective.entropy_weight:
        loss = loss - objective.entropy_weight * usage_entropy(levels, batch.free).sum() / part.total
    if objective.level_price:
        loss = loss + objective.level_price * (levels * free).sum() / count
    if chosen is not None and chosen.causal is not None:
        loss = loss + objective.causal_weight * (chosen.causal * scored).sum() / count
    observed = _observed(objective, refinement, chosen, cost, sketch.levels, scored, free)
    if chosen is not None and refinement is not None and chosen.kinds.learners.whole:
        slope = None
        if objective.trials:
            slope = slope_by_trial(sketch, cost, free, refinement.clock, path, chance, objective, chosen.kinds)
        push = _push(objective, chosen, free, slope)
        # By how many tokens learners have scored in the mean, since how many it is here other parts do not know.
        loss = loss + push / count * (part.total / chosen.kinds.learners.whole)
    return Output(
        loss=loss,
        sketch_bits=bits,
        flow_bits=flow,
        reconstruction=reconstruction,
        levels=sketch.levels,
        observed=observed,
    )


class Refinement(NamedTuple):
    """What the refining half makes of a sketch.

    Attributes:
        flow, reconstruction: bits, nats, (B, N).
        spoken: cross-entropy CE(p(·|z), x), smoothed, nats, (B, N).
        clock: (B,) in [0, 1), where the flow is measured unless the sequence is masked.
        measured: the flow there.
    """

    flow: Tensor
    reconstruction: Tensor
    spoken: Tensor
    clock: Tensor
    measured: Flow


def _refinement(
    sketch: Sketch, path: Path, chance: Chance, part: Part, objective: Objective, chosen: Chosen | None
) -> Refinement:
    """The flow at one value of the clock a sequence, evenly spread over the whole batch, and what is left at its end."""
    clock = (part.strata(sketch.noise) + chance.shared(sketch.noise)) % 1
    share, smoothing, tokens = objective.self_conditioning, objective.label_smoothing, sketch.batch.tokens
    measured = sketch.flow_bits(
        path,
        clock if chosen is None else torch.where(chosen.masked, 0.0, clock),
        chance,
        density=objective.clock,
        weight_cap=objective.weight_cap,
        estimated=None if share == 1 else part.some(share, None if chosen is None else chosen.kinds),
        gain=1 / objective.flow_weight,
    )
    flow, reconstruction = measured.bits, sketch.reconstruction(chance, network=False)
    said = cross_entropy(measured.denoised.log_probs, tokens)
    spoken = cross_entropy(measured.denoised.log_probs, tokens, smoothing) if smoothing else said
    if chosen is not None:
        # A masked sequence is decoded from where it was sketched, in one step: as good a code as one that falls first.
        at_once = chosen.masked.unsqueeze(1)
        flow = torch.where(at_once, said * sketch.live, flow)
        reconstruction = torch.where(at_once, 0.0, reconstruction)
    return Refinement(flow, reconstruction, spoken, clock, measured)


class Chosen(NamedTuple):
    """Levels to train on.

    Attributes:
        levels: (B, N), random ones of the explorers, those of the head with noise of the learners.
        masked: bool (B,), the explorers whose tokens are known or not at all, and stay so.
        head: what the head itself says of the learners, (learners, N).
        kinds: which sequences are which.
        teachers: those of the learners whose levels have a gradient.
        causal: cross-entropy of the clean first pass, nats, (B, N); None where there was no such pass.
    """

    levels: Tensor
    masked: Tensor
    head: Tensor
    kinds: Kinds
    teachers: Subset
    causal: Tensor | None


def training_levels(
    model: Evo,
    batch: Batch,
    noise: Tensor,
    waiting: Waiting | None,
    objective: Objective,
    chance: Chance,
    kinds: Kinds,
) -> Chosen:
    """Levels to train on: random ones for a share of the sequences, for the others, the learners, those of the head with noise.

    The head reads a first pass, and the levels have a gradient to the head alone. The pass is made over the learners at exploratory
    levels, without a gradient; or, where the objective weighs causal cross-entropy, over everything at level 0, and is then scored. What is
    to be sketched in parallel is so in that pass too.
    """
    learners, device = kinds.learners, noise.device
    explored, masked = random_levels(kinds.ranks, batch.tokens.shape[1], objective.exploration.masked, chance, noise)
    # Drawn for all, so that no sequence's later numbers depend on which of the two it is.
    logistic = chance.uniform(batch.tokens.shape[1], like=noise)
    rows, causal = learners.rows(device), None
    hidden = logits = noise
    if objective.causal_weight:
        first = Sketch(model, batch, torch.zeros_like(explored), noise, waiting)
        causal = cross_entropy(first.context_log_probs, batch.tokens)
        hidden, logits = first.hidden[rows].detach(), first.context_logits[rows].detach()
    elif learners.whole:
        visited = learners.visited(device)
        with torch.no_grad():
            behind = None if waiting is None else waiting.take(visited)
            first = Sketch(model, batch.take(visited), explored[visited], noise[visited], behind)
        hidden, logits = (each[: len(learners.places)] for each in (first.hidden, first.context_logits))
    teachers = kinds.some_learners(objective.teaching)
    if not learners.whole:
        return Chosen(explored, masked, explored[rows], kinds, teachers, causal)
    head = levels_of(model.timestep_head, hidden, logits)
    levels, masked[rows] = explored.clone(), False
    levels[rows] = with_logistic_noise(head, objective.exploration.noise, logistic[rows]).to(levels.dtype)
    # Every part asks its head for a gradient, be it of nothing: ranks with other sequences do.
    taught = torch.zeros(len(levels), 1, dtype=torch.bool, device=device)
    taught[teachers.rows(device)] = True
    return Chosen(torch.where(taught, levels, levels.detach()), masked, head, kinds, teachers, causal)


def _waiting(batch: Batch, noise: Tensor, parallel: Subset, chance: Chance) -> Waiting:
    """A place of the window, uniform, from which on the given sequences are sketched in parallel; of the others nothing waits."""
    # Drawn for all, as the levels' noise is.
    place, fresh = chance.uniform(like=noise), chance.normal(*noise.shape[1:], like=noise)
    known = torch.full_like(batch.prompt, noise.shape[1])
    rows = parallel.rows(noise.device)
    known[rows] = (batch.prompt + (place * batch.free.sum(1)).long())[rows]
    return Waiting(known=known, noise=fresh)


def _push(objective: Objective, chosen: Chosen, free: Tensor, slope: Tensor | None) -> Tensor | float:
    """What moves the head's logits beside the gradient of the bound, nats summed over its levels: ends that are better, and trials."""
    pushes: Tensor | float = 0.0
    if objective.extremes is not None:
        pushes = pushes + objective.extremes.push(chosen.head)
    if slope is not None:
        pushes = pushes + pushed(chosen.head, objective.trials * slope.to(chosen.head.dtype))
    if isinstance(pushes, float):
        return pushes
    return (pushes * free[chosen.kinds.learners.rows(free.device)]).sum()


def _observed(
    objective: Objective,
    refinement: Refinement | None,
    chosen: Chosen | None,
    cost: Tensor,
    levels: Tensor,
    scored: Tensor,
    free: Tensor,
) -> Tensor | None:
    """What the clock and the extremes of an objective learn from, see `Output.observed`."""
    tallies = []
    if objective.clock is not None:
        tallies.append(
            cost.new_zeros(objective.clock.figures, dtype=torch.float64)
            if refinement is None
            else objective.clock.tally(refinement.measured.remaining, (refinement.measured.integrand * scored).sum(1))
        )
    if objective.extremes is not None:
        tallies.append(
            cost.new_zeros(objective.extremes.figures, dtype=torch.float64)
            if chosen is None
            else _compared(objective.extremes, cost, levels, free, chosen)
        )
    return torch.cat(tallies) if tallies else None


def _compared(extremes: Extremes, cost: Tensor, levels: Tensor, free: Tensor, chosen: Chosen) -> Tensor:
    """The tally of what tokens cost, nats (B, N), at the head's levels, at level 0 and at level 1.

    Level 1 is found among the random levels; level 0 too, or, better, of the very sequences of the head, in the clean first pass.
    """
    explorers, learners = (kind.rows(cost.device) for kind in chosen.kinds[:2])

    def constant(level: int) -> tuple[Tensor, Tensor]:
        alike = ((levels[explorers] == level) | ~free[explorers]).all(1, keepdim=True)
        return cost[explorers], free[explorers] & alike & ~chosen.masked[explorers, None]

    zero = constant(0) if chosen.causal is None else (chosen.causal[learners], free[learners])
    return extremes.tally((cost[learners], free[learners]), zero, constant(1))
