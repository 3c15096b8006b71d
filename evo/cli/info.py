"""`evo info`: what there is to train, and what to train it on."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes and parameter counts of the presets, versions, and what this machine offers; or, with --preset, a training run on paper."""

    vocab_size: int = 65536
    """Vocabulary of the run, and of the second count of parameters; the first is of byte-level models."""
    preset: str | None = None
    """Plan a run of this size instead: memory, operations and time by arithmetic alone."""
    gpus: int = 1
    """GPUs of the run, over which weights, gradients, moments and average are sharded."""
    gpu_memory: float = 80.0
    """Memory of each, in GiB."""
    usable: float = 0.9
    """Share of that memory that can be filled; the rest is the allocator's and the network library's."""
    peak_tflops: float = 312.0
    """Operations of each in its precision, in 10^12 a second (312: A100, bf16)."""
    utilisation: float = 0.4
    """Share of the peak that is reached; recomputation counts as work, waiting for others does not."""
    precision: Literal["mixed", "autocast", "fp32"] = "mixed"
    """mixed gathers weights in bf16 and computes in it (FSDP); autocast casts at every product; state is fp32 in all of them."""
    checkpointing: bool = True
    """Compute blocks once more on the way back instead of keeping what is inside them."""
    length: int | None = None
    """Tokens of a sequence; by default the context."""
    micro_batch: int | None = None
    """Sequences a GPU computes at once; by default as many as fit."""
    accumulate: int = 1
    """Micro-batches to a step."""
    tokens: float = 1e12
    """Tokens to train on."""
    json: bool = False
    """Print JSON instead of tables."""


def run(options: Options) -> None:
    """Print what is known, or what a run would take."""
    # What follows needs torch; the help does not.
    from evo.cli import info_machine, info_run

    if options.preset is None:
        found, shown = info_machine.facts(options.vocab_size), info_machine.table
    else:
        found, shown = info_run.facts(options), info_run.table
    print(json_module.dumps(found, indent=2) if options.json else shown(found))
