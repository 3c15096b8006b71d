"""Where the time of generation goes, and how far it is from what the machine could do.

n tokens of a pass.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._harness import synchronize
from benchmarks.generate.ways import of_evo
from evo import Evo
from evo.core import Cache, Causal
from evo.heads import LinearDecoder, Prior

REST = "the rest"


class Clocks:
    """Seconds spent in named parts, each of which waits for the device before it begins and after it ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)

    @contextmanager
    def watching(self, parts: Mapping[str, nn.Module]) -> Iterator[None]:
        """Time every call of these modules, none of which may call another of them."""
        begun: list[float] = []

        def before(_module: object, _arguments: object) -> None:
            begun.append(now(self.device))

        def after(name: str, _module: object, _arguments: object, _result: object) -> None:
            self.seconds[name] += now(self.device) - begun.pop()

        handles = [module.register_forward_pre_hook(before) for module in parts.values()]
        handles += [module.register_forward_hook(partial(after, name)) for name, module in parts.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def timed(self, name: str, work: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same function, timed."""

        def call(*arguments: Tensor) -> Tensor:
            begun = now(self.device)
            result = work(*arguments)
            self.seconds[name] += now(self.device) - begun
            return result

        return call


def anatomy(
    model: Evo, prompt: Tensor, new: int, prior: Prior, options: Mapping[str, Any], *, rounds: int
) -> dict[str, float]:
    """Milliseconds of one call of `Evo.generate` by part: the median of so many calls, behind one that is not counted."""
    device = model.bos.device
    parts = {"backbone": model.backbone, "readout": model.readout, "timestep head": model.timestep_head}
    found = defaultdict[str, list[float]](list)
    for turn in range(rounds + 1):
        clocks = Clocks(device)
        write = of_evo(
            model,
            {**options, "decoder": clocks.timed("decoder", LinearDecoder())},
            clocks.timed("prior", prior),
        )
        with clocks.watching(parts):
            begun = now(device)
            write(prompt, new, torch.Generator(device).manual_seed(0))
            whole = now(device) - begun
        if turn:
            for name in (*parts, "prior", "decoder"):
                found[name].append(1e3 * clocks.seconds[name])
            found[REST].append(1e3 * (whole - sum(clocks.seconds.values())))
    return {name: statistics.median(times) for name, times in found.items()}


def rates(model: Evo, *, rounds: int = 20) -> tuple[float, float]:
    """What the machine can do: bytes a second of a matrix read once, as large as all weights of the backbone, by a product with a vector,
    and operations a second of a product of large matrices; the best of so many.
    """
    weight = model.backbone.norm.weight
    count = sum(parameter.numel() for parameter in model.backbone.parameters())
    side = 1024 if weight.device.type == "cpu" else 8192
    table, square = weight.new_ones(max(1, count // 1024), 1024), weight.new_ones(side, side)
    vector = table[0]
    with torch.no_grad():
        reading = min(_seconds(lambda: table @ vector, weight.device) for _ in range(rounds))
        computing = min(_seconds(lambda: square @ square, weight.device) for _ in range(min(5, rounds)))
    return table.numel() * table.element_size() / reading, 2 * side**3 / computing


@torch.no_grad()
def passes(model: Evo, prompt: Tensor, sizes: Sequence[int], *, rounds: int = 20) -> dict[int, float]:
    """Milliseconds of a causal pass over n tokens behind a prompt (B, P) with its keys and values cached, logits included.

    The best of so many: what else the machine is doing disturbs it least.
    """
    embeddings = model.latent_space.weight
    latents, level = model.behind_bos(embeddings[prompt], torch.zeros(prompt.shape, device=prompt.device))
    cache = Cache(latents.shape[1] + max(sizes))
    model.backbone(latents, level, mask=Causal(), cache=cache, store=True)
    found = {}
    for size in sizes:
        piece = latents[:, -1:].expand(-1, size, -1)
        zeros = level[:, :1].expand(-1, size)

        def one(piece: Tensor = piece, zeros: Tensor = zeros) -> Tensor:
            return model.readout(model.backbone(piece, zeros, mask=Causal(), cache=cache), embeddings)

        one()
        found[size] = 1e3 * min(_seconds(one, prompt.device) for _ in range(rounds))
    return found


def floor(model: Evo, tokens: int, reading: float, computing: float) -> float:
    """Milliseconds that a pass over so many tokens must take at these rates: its weights are read, its products made, one behind the other
    hidden. Attention is left out.
    """
    matrices = sum(parameter.numel() for parameter in model.backbone.parameters() if parameter.dim() == 2)
    size = model.backbone.norm.weight.element_size()
    return 1e3 * max(matrices * size / reading, 2 * matrices * tokens / computing)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given; of a CPU that computes with one thread, those that this process has had of it,
    of which other processes take none.
    """
    synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    begun = now(device)
    work()
    return now(device) - begun
