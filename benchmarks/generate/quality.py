"""How good what was written is: how likely an autoregressive model trained apart finds it, beside how varied it is.

Likelihood alone rewards dullness, variety alone rewards noise; a text has to hold its own in both.

S samples, P tokens of a prompt, M new tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evo import Evo

CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of a set of samples.

    Attributes:
        bits: per byte, under the judge, given the prompt.
        error: its standard error, from sample to sample.
        entropy: of a byte given the one before it, in bits, of all samples together. It comes out too low of few samples, by as much
            for all sets of one size.
        distinct: share of runs of four bytes that are different.
    """

    bits: float
    error: float
    entropy: float
    distinct: float


@torch.no_grad()
def quality(judge: Evo, prompt: Tensor, new: Tensor) -> Quality:
    """Of new tokens (S, M) behind prompts (S, P). S is at least 2 and M at least 4."""
    device = judge.bos.device
    chunks = torch.cat([prompt, new], 1).to(device).split(CHUNK)
    nats = torch.cat([-judge.log_prob(chunk, 0.0)[:, prompt.shape[1] :].double().cpu() for chunk in chunks])
    each = nats.mean(1) / math.log(2)
    return Quality(
        bits=each.mean().item(),
        error=(each.std() / len(each) ** 0.5).item(),
        entropy=conditional_entropy(new),
        distinct=distinct(new, 4),
    )


def conditional_entropy(samples: Tensor) -> float:
    """Entropy of a token given the one before it, of the pairs in samples (S, M), in bits."""
    pairs = torch.stack([samples[:, :-1], samples[:, 1:]], -1).flatten(0, 1)
    return _entropy(pairs) - _entropy(pairs[:, :1])


def distinct(samples: Tensor, size: int) -> float:
    """The share of runs of `size` tokens in samples (S, M) that are different."""
    runs = samples.unfold(1, size, 1).flatten(0, 1)
    return len(runs.unique(dim=0)) / len(runs)


def _entropy(rows: Tensor) -> float:
    """Of the distribution of rows (R, n), in bits."""
    share = rows.unique(dim=0, return_counts=True)[1].double() / len(rows)
    return -(share * share.log2()).sum().item()
