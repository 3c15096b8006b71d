"""What a model writes, read by another: generative perplexity, and the variety without which it means nothing.

S samples, N tokens each.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation.data import Data
from benchmarks.ablation.scoring import CHUNK, WRITTEN_AT, write
from evo import Evo
from evo.core import Generation
from evo.heads import NucleusPrior
from evo.schedules import Path

# Nothing is sharpened: a model that is as likely and less varied than the text has cut off its tails.
PRIOR = NucleusPrior(top_p=1.0, temperature=1.0)


def variety(samples: Tensor) -> dict[str, float]:
    """Of samples (S, N): entropy of the tokens in bits, and the share of runs of 1 to 3 tokens that are different."""
    counts = samples.flatten().bincount().double()
    share = counts[counts > 0] / counts.sum()
    found = {"entropy": -(share * share.log2()).sum().item()}
    for n in (1, 2, 3):
        runs = list(chain.from_iterable(zip(*(row[k:] for k in range(n)), strict=False) for row in samples.tolist()))
        found[f"distinct_{n}"] = len(set(runs)) / len(runs)
    return found


@torch.no_grad()
def perplexity(reader: Evo, samples: Tensor) -> float:
    """Exp of the mean negative log-likelihood that an autoregressive reader gives samples (S, N), per token."""
    chunks = samples.to(reader.bos.device).split(CHUNK)
    total = sum(-reader.log_prob(chunk, 0.0).double().sum().item() for chunk in chunks)
    return math.exp(total / samples.numel())


def sampled(model: Evo, data: Data, plan: Path, reader: Evo, *, count: int, seed: int) -> dict[str, dict[str, Any]]:
    """What is written at the variant's own levels and at fixed ones; and of the test text the same figures, which are the aim."""
    found: dict[str, dict[str, Any]] = {"text": _figures(data.test[:count], reader)}
    for name, level in WRITTEN_AT.items():
        found[name] = read(reader, *write(model, data, plan=plan, level=level, prior=PRIOR, seed=seed, count=count))
    return found


def read(reader: Evo, tokens: Tensor, written: Generation) -> dict[str, Any]:
    """Of what `write` has written: perplexity and variety, with mean level and network evaluations."""
    return {**_figures(tokens, reader), "mean_level": written.levels.mean().item(), "nfe": written.nfe}


def _figures(tokens: Tensor, reader: Evo) -> dict[str, Any]:
    return {"perplexity": perplexity(reader, tokens), **variety(tokens)}
