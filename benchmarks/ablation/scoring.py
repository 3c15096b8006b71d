"""How good a trained model is: its bound, and what it writes.

S sequences, N tokens, P prompt tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation.data import Data
from evo import Evo, evaluate
from evo.core import Generation
from evo.heads import FixedTimestep
from evo.schedules import Path
from evo.solvers import Solver
from evo.training.seeds import Purpose, generator

LEVELS: dict[str, float | None] = {"own": None, "0": 0.0, "0.5": 0.5, "1": 1.0}
WRITTEN_AT: dict[str, float | None] = {"own": None, "0": 0.0, "1": 1.0}
SUREST_FIRST = "1, surest first"
SURE = 0.9  # the probability from which a token is final there
CHUNK = 256


def bound(model: Evo, data: Data, path: Path, *, clock_values: int, seed: int) -> dict[str, dict[str, Any]]:
    """The bound of the test set at the variant's own levels and at fixed ones, in bits per answer token, or per byte of text."""
    device = model.bos.device
    test = data.test.to(device)
    mask = (torch.arange(data.length, device=device) >= data.prompt_length).expand(test.shape)
    found = {}
    for name, levels in LEVELS.items():
        result = evaluate(
            model,
            test,
            levels,
            prompt_length=data.prompt_length,
            loss_mask=mask,
            path=path,
            clock_values=clock_values,
            batch_size=CHUNK,
            generator=generator(device, seed, Purpose.EVALUATION),
            progress=False,
        )
        found[name] = result.bits_per(result.tokens if data.test_bytes is None else data.test_bytes)
    return found


@torch.no_grad()
def write(
    model: Evo,
    data: Data,
    *,
    plan: Path,
    level: float | None = None,
    max_steps: int = 20,
    fidelity: float | None = None,
    solver: Solver | None = None,
    prior: Callable[..., Tensor] | None = None,
    seed: int = 0,
    count: int | None = None,
) -> tuple[Tensor, Generation]:
    """Answers to the prompts of the test set (or its first `count`): tokens (S, N), and the last batch's generation with all levels.

    Greedy unless a `prior` is given; `level` None is the variant's own.
    """
    device = model.bos.device
    source = generator(device, seed, Purpose.EVALUATION, 1)
    prompts = data.test[:count, : data.prompt_length].to(device)
    written, levels, nfe = [], [], 0
    for chunk in prompts.split(CHUNK):
        found = model.generate(
            chunk,
            data.length - data.prompt_length,
            solver=solver,
            plan=plan,
            timestep_head=None if level is None else FixedTimestep(level),
            prior=prior,
            max_steps=max_steps,
            fidelity=fidelity,
            temperature=0.0,
            generator=source,
        )
        written.append(torch.cat([chunk, found.tokens], 1))
        levels.append(found.levels)
        nfe = found.nfe
    tokens = torch.cat(written)
    answer = tokens[:, data.prompt_length :]
    return tokens.cpu(), Generation(
        tokens=answer,
        lengths=torch.full_like(answer[:, 0], answer.shape[1]),
        levels=torch.cat(levels),
        nfe=nfe,
        accepted=None,
        trajectory=None,
    )


def accuracy(model: Evo, data: Data, **options: Any) -> dict[str, float]:
    """`graded` of what is written with the options of `write`."""
    return graded(data, *write(model, data, **options))


def graded(data: Data, tokens: Tensor, written: Generation) -> dict[str, float]:
    """The share of test prompts that are answered rightly, with its standard error, mean level and network evaluations."""
    assert data.task is not None
    right = data.task.grade(tokens).double()
    share = right.mean().item()
    wrong = (tokens != data.test[: len(tokens)])[:, data.prompt_length :]
    return {
        "accuracy": share,
        "standard_error": math.sqrt(share * (1 - share) / len(right)),
        "token_accuracy": 1 - wrong.double().mean().item(),
        "mean_level": written.levels.mean().item(),
        "nfe": written.nfe,
    }
