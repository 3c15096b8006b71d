"""Ways to write a text with the same weights.

B sequences, P tokens of a prompt, M new tokens.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evo import Evo
from evo.core import Speculation
from evo.heads import FixedTimestep, Prior
from evo.interop import export_causal_lm

AUTOREGRESSION = "autoregression"
"""The way that all others are compared with: level 0, with a cache."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """New tokens (B, M), and what is known of how they came about.

    Attributes:
        level: the mean that they were sketched at; None where there are no levels.
        accepted: guesses that became text in a round of speculation, the mean of all sequences; None where nothing was guessed.
    """

    tokens: Tensor
    level: float | None = None
    accepted: float | None = None


Write = Callable[[Tensor, int, torch.Generator], Written]
"""Prompts (B, P), M and the source of chance to what is written."""


def options_by_name(steps: int) -> dict[str, dict[str, Any]]:
    """Options of `Evo.generate` by the name of the way; K is `steps` where the name gives no other."""
    at_0, at_half, at_1 = (FixedTimestep(level) for level in (0.0, 0.5, 1.0))
    found: dict[str, dict[str, Any]] = {AUTOREGRESSION: {"timestep_head": at_0}}
    for size in (4, 16):
        found[f"speculation, run {size}"] = {"speculation": Speculation(run=size)}
    found["speculation, run 8, 2 steps"] = {"speculation": Speculation(run=8, steps=2)}
    found["speculation, run 8, causal"] = {"speculation": Speculation(run=8, causal=True)}
    for stride in (2, 4, 16):
        found[f"t = 0, stride {stride}"] = {"timestep_head": at_0, "stride": stride}
    found["learned t"] = {}
    found["learned t, windows of 16"] = {"window": 16}
    for stride in (4, 16):
        found[f"learned t, windows of 16, stride {stride}"] = {"window": 16, "stride": stride}
    for count in (5, 10, 20):
        found[f"t = .5, K = {count}"] = {"timestep_head": at_half, "max_steps": count}
    found["t = .5, K = 10, stride 16"] = {"timestep_head": at_half, "max_steps": 10, "stride": 16}
    for size in (4, 16):
        found[f"block diffusion, blocks of {size}, K = {steps}"] = {"timestep_head": at_1, "window": size}
        found[f"block diffusion, blocks of {size}, K = 4"] = {"timestep_head": at_1, "window": size, "max_steps": 4}
    found[f"diffusion, K = {steps}"] = {"timestep_head": at_1}
    found["diffusion, K = 5"] = {"timestep_head": at_1, "max_steps": 5}
    found[f"diffusion, K = {steps}, refresh 4"] = {"timestep_head": at_1, "refresh": 4}
    found[f"diffusion, K = {steps}, fidelity .9"] = {"timestep_head": at_1, "fidelity": 0.9}
    return {name: {"max_steps": steps, **options} for name, options in found.items()}


def of_evo(model: Evo, options: Mapping[str, Any], prior: Prior) -> Write:
    """`Evo.generate` with these options, the length exact."""

    def write(prompt: Tensor, new: int, generator: torch.Generator) -> Written:
        text = model.generate(prompt, new, prior=prior, generator=generator, **options)
        rounds = [each for row in text.accepted or () for each in row]
        return Written(
            tokens=text.tokens,
            level=text.levels.mean().item(),
            accepted=sum(rounds) / len(rounds) if rounds else None,
        )

    return write


@contextlib.contextmanager
def of_transformers(model: Evo, *, temperature: float, top_p: float) -> Iterator[Write]:
    """`generate` of transformers on the exported causal half.

    Raises:
        ImportError: where the package is not there.
        ValueError: for a model that no family of theirs computes.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("this needs transformers: pip install 'evo-lm[hf]'") from error
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model"
        export_causal_lm(model, exported)
        theirs: Any = AutoModelForCausalLM.from_pretrained(exported)
    theirs = theirs.to(model.bos.device).eval()
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}

    def write(prompt: Tensor, new: int, generator: torch.Generator) -> Written:
        # They draw from the generator of the process, and have no other.
        torch.manual_seed(generator.initial_seed())
        ids = F.pad(prompt, (1, 0), value=theirs.config.bos_token_id)
        whole = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            **sampling,
        )
        return Written(tokens=whole[:, ids.shape[1] :])

    yield write


@dataclass(kw_only=True)
class Work:
    """What passes through a network.

    Attributes:
        passes: calls of the backbone.
        rows: tokens that they read, those of the prompt included.
    """

    passes: int = 0
    rows: int = 0


@contextlib.contextmanager
def counted(model: Evo) -> Iterator[Work]:
    """Count the passes of `model` and the tokens they read."""
    work = Work()

    def note(_module: object, arguments: tuple[Tensor, ...], _result: object) -> None:
        work.passes += 1
        work.rows += arguments[0].shape[0] * arguments[0].shape[1]

    handle = model.backbone.register_forward_hook(note)
    try:
        yield work
    finally:
        handle.remove()
