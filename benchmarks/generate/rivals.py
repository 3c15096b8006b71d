"""All ways in turn: tokens a second against autoregression's, and the quality of what each writes.

S samples, P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks._harness import Comparison, compare
from benchmarks.generate.quality import Quality, quality
from benchmarks.generate.ways import AUTOREGRESSION, Write, counted, of_evo, of_transformers, options_by_name
from evo import Evo
from evo.heads import NucleusPrior

SEED = 7
TRANSFORMERS = "transformers, autoregression"


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What a way has written for every prompt.

    Attributes:
        quality: of it.
        level, accepted: see `Written`.
        passes: of the network, for each position to be written.
        rows: tokens read by the network, prompts aside, for each token written; None with `passes` where the network is not ours.
    """

    quality: Quality
    level: float | None
    accepted: float | None
    passes: float | None
    rows: float | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), **asdict(self.quality)}


def prompts(text: bytes, count: int, length: int, new: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts (S, P) and what follows them in the text (S, M), evenly spread over it.

    Raises:
        ValueError: where the text is too short for that.
    """
    size = length + new
    if len(text) < count * size:
        raise ValueError(
            f"{count} pieces of {size} bytes do not fit a text of {len(text)}: ask for fewer or shorter ones"
        )
    starts = torch.linspace(0, len(text) - size, count).long()
    whole = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    pieces = whole[starts[:, None] + torch.arange(size)].to(device)
    return pieces[:, :length], pieces[:, length:]


@contextmanager
def writers(model: Evo, *, steps: int, temperature: float, top_p: float, like: str) -> Iterator[Mapping[str, Write]]:
    """Ways by name, of those whose name contains `like`; autoregression, which they are compared with, in any case."""
    prior = NucleusPrior(temperature=temperature, top_p=top_p)
    ways = {name: of_evo(model, options, prior) for name, options in options_by_name(steps).items()}
    ways = {name: write for name, write in ways.items() if name == AUTOREGRESSION or like in name}
    with ExitStack() as stack:
        if like in TRANSFORMERS:
            try:
                ways[TRANSFORMERS] = stack.enter_context(of_transformers(model, temperature=temperature, top_p=top_p))
            except (ImportError, ValueError) as reason:
                print(f"{TRANSFORMERS}, is passed over: {reason}")
        yield ways


def sampled(model: Evo, judge: Evo, write: Write, prompt: Tensor, new: int, batch: int) -> Sampled:
    """What is written behind every prompt (S, P), in batches, and judged."""
    generator = torch.Generator(prompt.device).manual_seed(SEED)
    with counted(model) as work:
        found = [write(chunk, new, generator) for chunk in prompt.split(batch)]
    tokens = torch.cat([each.tokens for each in found])
    read = work.rows - prompt.numel() - len(prompt) * model.bos_slots
    return Sampled(
        quality=quality(judge, prompt.cpu(), tokens.cpu()),
        level=_mean([each.level for each in found]),
        accepted=_mean([each.accepted for each in found]),
        passes=work.passes / (len(found) * new) if work.passes else None,
        rows=read / tokens.numel() if work.passes else None,
    )


def timed(ways: Mapping[str, Write], prompt: Tensor, new: int, rounds: int) -> Iterator[tuple[str, Comparison]]:
    """Of each way in turn: the time of autoregression in units of its own, so that more is faster."""

    def run(write: Write) -> object:
        return write(prompt, new, torch.Generator(prompt.device).manual_seed(SEED))

    for name, write in ways.items():
        yield (
            name,
            compare(
                lambda: run(ways[AUTOREGRESSION]),
                lambda write=write: run(write),
                device=prompt.device,
                rounds=rounds,
            ),
        )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
