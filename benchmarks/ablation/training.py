"""The loop of a row: `evo.training`'s pieces, nothing of them repeated.

B sequences of a step, N tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from benchmarks.ablation.data import Data
from benchmarks.ablation.flops import counter
from benchmarks.ablation.sizes import Size
from benchmarks.ablation.variants import Phase, Variant
from evo import Evo
from evo.files import write_json
from evo.training import Checkpointer, CurriculumConfig, learning_rate
from evo.training.curriculum import PATHS, objective
from evo.training.optimizer import step_if
from evo.training.precision import autocast
from evo.training.seeds import Purpose, derive, generator
from evo.training.state import TrainState

# Steps of a phase whose operations are counted; the objective changes as a run goes on, so one would not do.
COUNTED = 8

# Share of the examples that a phase which trains on held-out ones has for itself.
HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training came to.

    Attributes:
        model: the averaged weights, in evaluation mode.
        steps, tokens: made, and seen; prompts count.
        flops: floating-point operations of all steps, from those counted.
        seconds: they took, those of steps that were lost when a run was cut off left out.
        losses: step of its phase and training loss, in nats a scored token, about fifty times a phase.
    """

    model: Evo
    steps: int
    tokens: int
    flops: float
    seconds: float
    losses: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that training depends on.

    Attributes:
        budget: tokens, prompts included.
        checkpoints: folder for them; None makes none.
        save_seconds: from one checkpoint to the next.
    """

    data: Data
    size: Size
    variant: Variant
    curriculum: CurriculumConfig
    seed: int
    budget: int
    device: torch.device
    checkpoints: Path | None = None
    save_seconds: float = 300.0
    progress: bool = True
    description: str = "training"

    @property
    def batch_size(self) -> int:
        return max(1, round(self.size.step_tokens / self.data.length))

    def of(self, phase: Phase) -> Plan:
        """The plan of one phase: with the examples that it has of those there are, and with its own curriculum."""
        data = self.data
        if any(each.held_out for each in self.variant.phases):
            data = data.parted(HELD_OUT)[phase.held_out]
        return replace(self, data=data, curriculum=replace(self.curriculum, **phase.curriculum))


def build(plan: Plan) -> Evo:
    """The untrained model of a plan, on its device."""
    torch.manual_seed(plan.seed)
    config = plan.size.config(plan.data.vocab_size, plan.data.length)
    return plan.variant.build(config).to(plan.device)


def fit(plan: Plan) -> Trained:
    """Train the variant on the budget, phase after phase; a run that was cut off goes on from its last checkpoint."""
    model, budget_steps = build(plan), max(1, plan.budget // (plan.batch_size * plan.data.length))
    trained: list[Trained] = []
    for index, phase in enumerate(plan.variant.phases):
        steps = max(1, round(phase.share * budget_steps))
        trained.append(_phase(plan.of(phase), index, phase, model, steps))
        model.load_state_dict(trained[-1].model.state_dict())
    return Trained(
        model=trained[-1].model,
        steps=sum(part.steps for part in trained),
        tokens=sum(part.tokens for part in trained),
        flops=sum(part.flops for part in trained),
        seconds=sum(part.seconds for part in trained),
        losses=[entry for part in trained for entry in part.losses],
    )


def _phase(plan: Plan, index: int, phase: Phase, model: Evo, steps: int) -> Trained:
    if phase.prepare is not None:
        phase.prepare(model)
    state = TrainState.begin(model, plan.size.optimizer())
    folder = None if plan.checkpoints is None else plan.checkpoints / f"phase-{index}"
    notes = _Notes()
    checkpoints = None if folder is None else Checkpointer(folder, keep=1)
    if folder is not None and checkpoints is not None:
        checkpoints.restore(state, corpus=plan.description)
        notes = _Notes.upto(folder, state.step)
    counted, logged = _spread(steps, COUNTED), _spread(steps, 50)
    begun = saved = time.perf_counter()
    bar = tqdm(
        total=steps,
        initial=state.step,
        desc=plan.description,
        unit="step",
        disable=None if plan.progress else True,
        leave=False,
    )
    with bar, nullcontext() if checkpoints is None else checkpoints:
        while state.step < steps:
            step, counting = state.step, counter() if state.step in counted else None
            with nullcontext() if counting is None else counting:
                loss = train_step(plan, phase, index, state, steps)
            if counting is not None:
                notes.flops.append([step, counting.get_total_flops()])
            if step in logged:
                notes.losses.append([step, loss.item()])
            bar.update()
            now = time.perf_counter()
            if (
                folder is not None
                and checkpoints is not None
                and (now - saved > plan.save_seconds or state.step == steps)
            ):
                notes.seconds, begun, saved = notes.seconds + now - begun, now, now
                notes.write(folder)
                checkpoints.save(state, corpus=plan.description)
    notes.seconds += time.perf_counter() - begun
    return Trained(
        model=state.ema.model,
        steps=steps,
        tokens=steps * plan.batch_size * plan.data.length,
        flops=steps * sum(count for _, count in notes.flops) / len(notes.flops),
        seconds=notes.seconds,
        losses=notes.losses,
    )


@dataclass(kw_only=True)
class _Notes:
    """What is known of the steps made, in this process and before it: [step, operations], [step, loss], seconds."""

    flops: list[list[int]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "notes.json", asdict(self))

    @classmethod
    def upto(cls, folder: Path, step: int) -> _Notes:
        """Those in `folder`, of the steps before `step`."""
        file = folder / "notes.json"
        if not file.is_file():
            return cls()
        known = json.loads(file.read_text(encoding="utf-8"))
        flops, losses = ([entry for entry in known[name] if entry[0] < step] for name in ("flops", "losses"))
        return cls(flops=flops, losses=losses, seconds=known["seconds"])


def train_step(plan: Plan, phase: Phase, index: int, state: TrainState, steps: int) -> Tensor:
    """One step of the optimizer; the loss, 0-dim."""
    data, device, optimizer = plan.data, plan.device, plan.size.optimizer()
    # Phases draw from streams of their own, as runs of other seeds would.
    seed = derive(plan.seed, Purpose.DATA, index) if index else plan.seed
    tokens = data.batch(seed, state.step, plan.batch_size).to(device)
    answer = (torch.arange(data.length, device=device) >= data.prompt_length).expand(tokens.shape)
    asked = objective(plan.curriculum, state.step, steps, state.clock, state.extremes)
    with autocast(device, "bf16" if device.type == "cuda" else "fp32"):
        out = state.model(
            tokens,
            loss_mask=answer,
            levels=phase.levels,
            prompt_length=data.prompt_length,
            path=PATHS[plan.curriculum.path],
            generator=generator(device, seed, Purpose.LEVELS, state.step),
            objective=asked,
        )
    asked.observe(out.observed)
    out.loss.backward()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(optimizer, state.step, steps)
    norm = clip_grad_norm_(state.model.parameters(), optimizer.clip)
    finite = out.loss.isfinite() & norm.isfinite()
    step_if(state.optimizer, finite)
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.model, state.step)
    state.skipped += ~finite
    state.step += 1
    return out.loss.detach()


def _spread(steps: int, count: int) -> frozenset[int]:
    places: Iterable[float] = torch.linspace(0, steps - 1, min(steps, count)).tolist()
    return frozenset(round(place) for place in places)
