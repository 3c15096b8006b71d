"""The time of refinement at mean levels of a tenth to three quarters, against t = 1, where every token takes every step.

    python benchmarks/refine_cost.py [--model demo/model]

Refinement is what is timed: the whole of `generate` less a `generate` of the same window that refines nothing is too noisy
a difference, so the plan is walked directly, behind a prompt that has been read. The text is Python's own library, noised.
With a trained model of bytes the deviation of reused keys and values, and what early stopping costs, mean something.
"""

from __future__ import annotations

import argparse
import textwrap
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from _harness import compare, describe_machine, keep_memory, parser, table, write_json
from torch import Tensor

from evo import Evo
from evo.core.prompted import Prompted
from evo.core.refinement import Request, SketchedWindow, refine
from evo.heads import LinearDecoder
from evo.schedules import early_stop
from evo.solvers import Euler


@dataclass(frozen=True, kw_only=True)
class Watched(LinearDecoder):
    """A decoder that keeps what it was told, by the number of the token."""

    seen: dict[float, Tensor] = field(default_factory=dict)

    def __call__(self, logits: Tensor, denoised: Tensor, embeddings: Tensor, uniform: Tensor) -> Tensor:
        self.seen.update(zip(uniform.tolist(), logits.softmax(-1), strict=True))
        return super().__call__(logits, denoised, embeddings, uniform)


class Bench:
    """Windows of one text at any levels, refined in any way."""

    def __init__(self, model: Evo, batch: int, prompt: int, window: int, steps: int, draws: torch.Generator) -> None:
        self.model, device, size = model, model.bos.device, prompt + window
        text = b"".join(Path(module.__file__ or "").read_bytes() for module in (argparse, textwrap, typing))
        starts = torch.randint(0, len(text) - size, (batch,), generator=torch.Generator().manual_seed(2))
        tokens = torch.tensor([list(text[start : start + size]) for start in starts.tolist()], device=device)
        with torch.no_grad():
            self.state = Prompted(model, tokens[:, :prompt], None, room=window)
            self.clean = model.latent_space.weight[tokens[:, prompt:]]
        self.tokens = tokens[:, prompt:]
        self.noise = torch.randn(self.clean.shape, device=device, generator=draws)
        self.uniform = torch.rand(self.tokens.shape, device=device, generator=draws)
        self.request = Request(
            solver=Euler(), plan=early_stop, decoder=LinearDecoder(), max_steps=steps, window=window, trajectory=False
        )

    @torch.no_grad()
    def refined(self, levels: Tensor, **options: object) -> tuple[Tensor, int]:
        """Tokens (B, N) and network evaluations."""
        latents = self.model.schedule.noised(self.clean, self.noise, levels)
        sketch = SketchedWindow(
            tokens=self.tokens,
            latents=torch.where((levels > 0).unsqueeze(-1), latents, self.clean),
            levels=levels,
            uniform=self.uniform,
            length=None,
        )
        tokens, nfe, _ = refine(self.state, sketch, replace(self.request, **options))
        return tokens, nfe

    def deviation(self, levels: Tensor, **options: object) -> tuple[float, float, float]:
        """Against refresh=1 without early stopping: tokens that differ, mean distance in p(v|z) at commitment; and tokens recovered."""
        exact, other = Watched(), Watched()
        before, _ = self.refined(levels, decoder=exact)
        after, _ = self.refined(levels, decoder=other, **options)
        live = levels > 0
        distance = [0.5 * (exact.seen[token] - other.seen[token]).abs().sum() for token in exact.seen]
        found = (after != before)[live], torch.stack(distance), (after == self.tokens)[live]
        differ, mean, recovered = (x.float().mean().item() for x in found)
        return differ, mean, recovered


def main() -> None:
    options = parser(__doc__ or "", "refine_cost")
    options.add_argument("--model", type=Path, help="a saved model of bytes; random weights of --preset by default")
    options.add_argument("--preset", default="tiny")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--prompt", type=int, default=128)
    options.add_argument("--window", type=int, default=128)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--refresh", type=int, nargs="+", default=[1, 4, 20])
    options.add_argument("--fidelity", type=float, nargs="*", default=[0.9, 0.99, 0.999])
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    keep_memory()
    draws = torch.Generator(given.device).manual_seed(1)
    torch.manual_seed(0)
    model = Evo.from_pretrained(given.model) if given.model else Evo.from_preset(given.preset, vocab_size=259)
    bench = Bench(model.to(given.device).eval(), given.batch, given.prompt, given.window, given.steps, draws)
    uniform = torch.rand(bench.tokens.shape, device=given.device, generator=draws)
    ones = torch.ones_like(uniform)
    cases = {}
    for mean in (0.1, 0.25, 0.5, 0.75):
        # A constant .1 lies at the lower end of the schedule, and is a realised word.
        if mean > bench.model.schedule.t_min:
            cases[f"every token at {mean}"] = mean * ones
        cases[f"a share of {mean} at 1, the others at 0"] = (uniform < mean).float()
    cases["uniform in [0, 1]"] = torch.where(uniform > bench.model.schedule.t_min, uniform, 0.0)
    variants = [{"refresh": refresh} for refresh in given.refresh]
    variants += [{"refresh": 1, "fidelity": fidelity} for fidelity in given.fidelity]
    machine, rows, results = describe_machine(given.device), [], []
    for name, levels in cases.items():
        for variant in variants:
            found = compare(
                lambda levels=levels, variant=variant: bench.refined(levels, **variant),
                lambda: bench.refined(ones),
                device=given.device,
                rounds=given.rounds,
            )
            nfe = bench.refined(levels, **variant)[1]
            differ, distance, recovered = bench.deviation(levels, **variant)
            said = ", ".join(f"{key}={value:g}" for key, value in variant.items())
            mean = levels.mean().item()
            deviation = (f"{differ:.2%}", f"{distance:.4f}", f"{recovered:.2%}")
            rows.append((name, f"{mean:.2f}", said, nfe, str(found), *deviation))
            figures = {"nfe": nfe, "differ": differ, "distance": distance, "recovered": recovered, **vars(found)}
            results.append({"levels": name, "mean_level": mean, **variant, **figures})
    print(machine)
    head = ("levels", "mean t", "how", "nfe", "time against t = 1 (10th to 90th percentile)")
    print(table((*head, "tokens that differ", "distance of p", "recovered"), rows))
    shape = list(bench.tokens.shape)
    write_json(
        given.out, {"machine": machine, "model": str(given.model or given.preset), "shape": shape, "cases": results}
    )


if __name__ == "__main__":
    main()
