"""Single levels tried at their other end, where the gradient of the bound has nothing to say of it.

B batch, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo.core.bound import Sketch
from evo.core.chance import Chance
from evo.core.part import Kinds
from evo.schedules import Path

if TYPE_CHECKING:
    from evo.core.objective import Objective


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """Levels of which one a sequence has been moved to the end that is farther away.

    One alone: of several, each would be charged with what the others cost.

    Attributes:
        levels: (B, N).
        moved: bool (B, N), which of them were.
    """

    levels: Tensor
    moved: Tensor

    @classmethod
    def of(cls, levels: Tensor, free: Tensor, u: Tensor) -> Trial:
        """Move the token of least u, (B, N) in [0, 1), among those of each sequence that are `free`, bool (B, N)."""
        least = torch.where(free, u, 2.0).argmin(1, keepdim=True)
        moved = free & (torch.arange(free.shape[1], device=free.device) == least)
        return cls(levels=torch.where(moved, (levels < 0.5).to(levels.dtype), levels), moved=moved)

    def slope(self, beyond: Tensor) -> Tensor:
        """What is to be had by lowering each level: nats, (B, N).

        It is what moving it cost, with the sign of the way it went; 0 of the others.

        `beyond`, (B,), is what each sequence costs at these levels beyond what it did before, in nats.
        """
        return torch.where(self.moved, torch.where(self.levels > 0.5, 1, -1) * beyond.unsqueeze(1), 0.0)


@torch.no_grad()
def slope_by_trial(
    sketch: Sketch,
    cost: Tensor,
    free: Tensor,
    clock: Tensor,
    path: Path,
    chance: Chance,
    objective: Objective,
    kinds: Kinds,
) -> Tensor:
    """What is to be had by lowering levels of the learners, found by one trial on the same noise, at the same values of the clock.

    Args:
        sketch: of the batch, from which the trial differs in a few levels.
        cost: of each token there, nats, (B, N).
        free: bool (B, N), which levels may be moved.
        clock: (B,) where the flow was measured.
        path, chance, objective: as they were for the batch.
        kinds: which sequences are learners.

    Returns:
        `Trial.slope`, nats, (learners, N).
    """
    learners, share = kinds.learners, objective.self_conditioning
    rows = learners.visited(free.device)
    trial = Trial.of(sketch.levels[rows], free[rows], chance.uniform(free.shape[1], like=cost)[rows])
    again, chance = sketch.again(rows, trial.levels), chance.take(learners.visited_places)
    flow = again.flow_bits(
        path,
        clock[rows],
        chance,
        density=objective.clock,
        weight_cap=objective.weight_cap,
        estimated=None if share == 1 else kinds.some_learners(share).within(learners),
    )
    found = again.bits()[0] + flow.bits + again.reconstruction(chance, network=False)
    found = found + objective.level_price * again.levels
    return trial.slope(((found - cost[rows]) * free[rows]).sum(1))[: len(learners.places)]
