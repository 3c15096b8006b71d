"""Writing between two texts: from the arguments of `Evo.infill` to what has to be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evo.core.contract import Lengths, as_lengths, check_tokens
from evo.core.generation import Job
from evo.core.job import as_job
from evo.core.suffix import Suffix

if TYPE_CHECKING:
    from evo.core.model import Evo


def as_infill(
    model: Evo,
    prefix: Tensor,
    suffix: Tensor,
    length: Lengths | None,
    max_length: Lengths | None,
    min_length: Lengths,
    prefix_lengths: Lengths | None,
    suffix_lengths: Lengths | None,
    options: Mapping[str, Any],
) -> Job:
    """What `model` is asked for by the arguments of `Evo.infill`, which has their meaning; raises what it raises."""
    most = max_length if length is None else length
    if most is None or (length is not None and max_length is not None):
        raise ValueError(
            f"length is {length} and max_length {max_length}; give one of them: length is exact, up to max_length a stop token may end it"
        )
    if length is not None and not (isinstance(min_length, int) and min_length == 0):
        raise ValueError(
            f"length is {length} and min_length {min_length}; an exact length has no other minimum: leave it out"
        )
    check_tokens(model, suffix, "suffix", minimum=0)
    fewest = min_length if length is None else length
    job = as_job(model, prefix, most, min_new_tokens=fewest, lengths=prefix_lengths, **options)
    if len(suffix) != len(prefix):
        raise ValueError(
            f"prefix has {len(prefix)} sequences, suffix {len(suffix)}; every sequence needs both (either may be empty)"
        )
    widest = prefix.shape[1] + max(job.ends.most) + suffix.shape[1]
    if widest > model.context:
        raise ValueError(
            f"a prefix of {prefix.shape[1]} tokens, {max(job.ends.most)} new ones and a suffix of {suffix.shape[1]} do not fit the model's "
            f"context of {model.context}: shorten them, or build the model with a larger context; "
            "in a batch the longest of each must fit together"
        )
    lengths = None if suffix_lengths is None else as_lengths("suffix_lengths", suffix_lengths, suffix, 0)
    gap = torch.tensor(job.ends.most, device=suffix.device)
    return replace(job, suffix=Suffix(tokens=suffix, lengths=lengths, gap=gap))
