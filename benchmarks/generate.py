"""What generation costs beside the passes of the network that it cannot do without.

    python benchmarks/generate.py

`generate` at t = 0 against the barest autoregressive loop over the same forward pass: read the prompt, then speak, draw and read, token by
token, with the same cache and the same prior, and nothing else. Overhead aimed at: 5 % at most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from _harness import compare, describe_machine, keep_memory, parser, table, write_json

from evo import Evo
from evo.core import Cache, Causal
from evo.heads import FixedTimestep, NucleusPrior

PRIORS = {"greedy": NucleusPrior(temperature=0.0), "nucleus": NucleusPrior()}


@torch.no_grad()
def barest(model: Evo, prompt: torch.Tensor, new: int, prior: NucleusPrior) -> torch.Tensor:
    """The loop that generation at t = 0 is compared with: tokens (B, M)."""
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


def ways(model: Evo, prompt: torch.Tensor, new: int, prior: NucleusPrior) -> dict[str, Callable[[], object]]:
    """Ways to write the same text, by name."""
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


def main() -> None:
    options = parser(__doc__ or "", "generate")
    options.add_argument("--preset", default="tiny")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--new", type=int, default=64)
    options.add_argument("--rounds", type=int, default=10)
    given = options.parse_args()
    keep_memory()
    torch.manual_seed(0)
    model = Evo.from_preset(given.preset, vocab_size=259).to(given.device).eval()
    rows, found = [], []
    for batch in given.batch:
        prompt = torch.randint(1, 256, (batch, given.prompt), device=given.device)
        for kind, prior in PRIORS.items():
            bare = partial(barest, model, prompt, given.new, prior)
            for name, write in ways(model, prompt, given.new, prior).items():
                timed = compare(write, bare, device=given.device, rounds=given.rounds)
                speed = 1e3 * batch * given.new / timed.first_ms
                rows.append([batch, kind, name, f"{speed:.0f}", timed])
                found.append({"batch": batch, "prior": kind, "way": name, "tokens_per_second": speed, **vars(timed)})
    machine = describe_machine(given.device)
    print(machine["device"], f"{given.new} new tokens behind {given.prompt}, preset {given.preset}", sep=", ")
    print(table(["batch", "prior", "generate", "tokens/s", "time / barest loop"], rows))
    settings = {"preset": given.preset, "prompt": given.prompt, "new": given.new, "rounds": given.rounds}
    write_json(given.out, {"machine": machine, "settings": settings, "overhead": found})


if __name__ == "__main__":
    main()
