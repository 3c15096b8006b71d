"""A training run of twenty steps that may be cut among ranks and passes in any way, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from evo import Evo
from evo.core import ClockDensity, Exploration, Extremes, Objective, Part
from evo.training.config import OptimizerConfig
from evo.training.optimizer import Ema, adamw, step_if
from evo.training.parallel import ParallelConfig, accumulating, clip_gradients, data_ranks, data_sum, parallelize
from tests.conftest import random_model

STEPS, ROWS, LENGTH = 20, 8, 9
CONFIG = OptimizerConfig(learning_rate=3e-3, warmup=0, clip=0.3, ema=0.9)


def build(dtype: torch.dtype = torch.float64, seed: int = 0) -> Evo:
    return random_model(seed, dtype, width=16, kv_heads=2, self_conditioning=True).train()


def corpus(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, prompt lengths and lengths of the whole batch of a step."""
    draws = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 7, (ROWS, LENGTH), generator=draws)
    lengths = torch.randint(4, LENGTH + 1, (ROWS,), generator=draws)
    prompts = torch.randint(0, 3, (ROWS,), generator=draws)
    return tokens, prompts, lengths


def objective(step: int, clock: ClockDensity, extremes: Extremes) -> Objective:
    """What a run asks one after the other: levels all random and no head; then learned, with and without a clean first pass."""
    share = 1.0 if step < 5 else 0.4
    return Objective(
        exploration=Exploration(share=share),
        causal_weight=step % 2,
        clock=clock,
        extremes=extremes,
        trials=0.7,
        self_conditioning=0.3,
    )


def train(
    config: ParallelConfig,
    mesh: DeviceMesh | None,
    *,
    passes: int = 1,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    each: Callable[[torch.nn.Module, Evo, int], None] | None = None,
) -> dict[str, Tensor]:
    """Losses, gradient norms, weights and averaged weights, whole on every rank. `each` is called after every step."""
    evo = build(dtype, seed)
    ema = Ema(evo, CONFIG.ema)
    model = parallelize(evo, config, mesh)
    parallelize(ema.model, config, mesh)
    optimizer = adamw(model, CONFIG)
    clock, extremes = ClockDensity(), Extremes()
    index, count = data_ranks(mesh)
    share = ROWS // count
    losses, norms = [], []
    for step in range(steps):
        tokens, prompts, lengths = corpus(step)
        asked = objective(step, clock, extremes)
        loss, observed = torch.zeros((), dtype=torch.float64), torch.zeros(())
        for number in range(passes):
            size = share // passes
            rows = range(index * share + number * size, index * share + (number + 1) * size)
            here = slice(rows.start, rows.stop)
            with accumulating(model, last=number == passes - 1):
                out = model(
                    tokens[here],
                    prompt_length=prompts[here],
                    lengths=lengths[here],
                    generator=[torch.Generator().manual_seed(1000 * step + row) for row in rows],
                    objective=asked,
                    part=Part(
                        rows=rows, total=ROWS, scored=int(lengths.sum()), common=torch.Generator().manual_seed(step)
                    ),
                )
                out.loss.backward()
            loss += out.loss.detach().double()
            observed = observed + out.observed
        asked.observe(data_sum(observed, mesh))
        norm = clip_gradients(model, CONFIG.clip)
        step_if(optimizer, norm.isfinite())
        optimizer.zero_grad(set_to_none=True)
        ema.update(model, step)
        losses.append(data_sum(loss, mesh))
        norms.append(norm.double())
        if each is not None:
            each(model, ema.model, step)
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        **{f"weight {name}": value for name, value in whole(evo).items()},
        **{f"average {name}": value for name, value in whole(ema.model).items()},
    }


def whole(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights, put together from their shards."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.named_parameters()
    }


def reference(folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The run of one process; rank 0 makes it, once, and the others read it."""
    file = folder / f"reference-{str(dtype).removeprefix('torch.')}.safetensors"
    if not file.exists() and dist.get_rank() == 0:
        save_file(train(ParallelConfig(), None, dtype=dtype), file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
    dist.barrier()
    return load_file(file)


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest absolute difference of losses, norms, weights and averages."""
    assert found.keys() == expected.keys()
    largest: dict[str, float] = {}
    for name, value in found.items():
        kind = name.split()[0]
        largest[kind] = max(largest.get(kind, 0.0), (value - expected[name]).abs().max().item())
    return largest
