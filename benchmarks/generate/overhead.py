"""What generation at t = 0 costs beside the passes of the network that it cannot do without.

B sequences, P tokens of a prompt, M new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks._harness import Comparison, compare
from evo import Evo
from evo.core import Cache, Causal
from evo.heads import FixedTimestep, NucleusPrior

PRIORS = {"greedy": NucleusPrior(temperature=0.0), "nucleus": NucleusPrior()}


@torch.no_grad()
def barest(model: Evo, prompt: Tensor, new: int, prior: NucleusPrior) -> Tensor:
    """The loop that generation at t = 0 is compared with: read the prompt, then speak, draw and read, token by token. Tokens (B, M)."""
    embeddings = model.latent_space.weight
    latents, level = model.behind_bos(embeddings[prompt], torch.zeros(prompt.shape, device=prompt.device))
    cache = Cache(latents.shape[1] + new)
    hidden = model.backbone(latents, level, mask=Causal(), cache=cache, store=True)[:, -1:]
    uniform = torch.rand(len(prompt), new, device=prompt.device)
    level, tokens = level[:, :1], []
    for index in range(new):
        if index:
            hidden = model.backbone(embeddings[tokens[-1]][:, None], level, mask=Causal(), cache=cache, store=True)
        tokens.append(prior(model.readout(hidden, embeddings)[:, 0], uniform[:, index]))
    return torch.stack(tokens, 1)


def same_text(model: Evo, prompt: Tensor, new: int, prior: NucleusPrior) -> dict[str, Callable[[], object]]:
    """Ways of `Evo` to write at level 0, by name."""
    fixed = {"timestep_head": FixedTimestep(0.0), "prior": prior, "generator": torch.Generator(prompt.device)}
    asked = {**fixed, "timestep_head": lambda hidden, logits: logits.new_zeros(logits.shape[:-1])}
    return {
        "level fixed": partial(model.generate, prompt, new, **fixed),
        "level fixed, windows of 16": partial(model.generate, prompt, new, window=16, **fixed),
        "level fixed, no stop before the end": partial(
            model.generate, prompt, new, stop=0, min_new_tokens=new, **fixed
        ),
        "level fixed, streamed": lambda: list(model.stream(prompt, new, **fixed)),
        "level asked for": partial(model.generate, prompt, new, **asked),
        "level asked for, windows of 16": partial(model.generate, prompt, new, window=16, **asked),
        "level asked for, windows of 1": partial(model.generate, prompt, new, window=1, **asked),
    }


def overhead(model: Evo, prompt: Tensor, new: int, rounds: int) -> dict[tuple[str, str], Comparison]:
    """Time in units of the barest loop's, by prior and way."""
    return {
        (kind, name): compare(write, partial(barest, model, prompt, new, prior), device=prompt.device, rounds=rounds)
        for kind, prior in PRIORS.items()
        for name, write in same_text(model, prompt, new, prior).items()
    }
