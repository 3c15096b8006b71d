"""The time of refinement at mean levels of a quarter and a half, against t = 1, where every token takes every step.

    python benchmarks/refine_cost.py

Refinement is what is timed: the whole of `generate` less a `generate` of the same window that refines nothing is too noisy
a difference, so the plan is walked directly, behind a prompt that has been read.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from _harness import compare, describe_machine, keep_memory, parser, table, write_json

from evo import Evo
from evo.core.prompted import Prompted
from evo.core.refinement import Request, SketchedWindow, refine
from evo.heads import FixedTimestep, LinearDecoder, NucleusPrior
from evo.schedules import early_stop
from evo.solvers import Euler


def main() -> None:
    options = parser(__doc__ or "", "refine_cost")
    options.add_argument("--preset", default="tiny")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--prompt", type=int, default=128)
    options.add_argument("--window", type=int, default=128)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--rounds", type=int, default=10)
    given = options.parse_args()
    keep_memory()
    draws = torch.Generator(given.device).manual_seed(1)
    torch.manual_seed(0)
    model = Evo.from_preset(given.preset, vocab_size=259).to(given.device).eval()
    prompt = torch.randint(0, 256, (given.batch, given.prompt), device=given.device, generator=draws)
    shape = (given.batch, given.window)
    request = Request(
        max_new_tokens=given.window,
        solver=Euler(),
        plan=early_stop,
        timestep_head=FixedTimestep(1.0),
        prior=NucleusPrior(),
        decoder=LinearDecoder(),
        max_steps=given.steps,
        window=given.window,
        stop=None,
        generator=draws,
        trajectory=False,
    )
    with torch.no_grad():
        state = Prompted(model, prompt, None, room=given.window)
    sketch = SketchedWindow(
        tokens=torch.randint(0, 256, shape, device=given.device, generator=draws),
        latents=torch.randn(*shape, model.latent_space.dim, device=given.device, generator=draws),
        levels=torch.ones(shape, device=given.device),
        length=None,
    )

    def refined(levels: torch.Tensor):
        @torch.no_grad()
        def work() -> int:
            return refine(state, replace(sketch, levels=levels), request)[1]

        return work

    uniform = torch.rand(shape, device=given.device, generator=draws)
    cases = {}
    for mean in (0.25, 0.5):
        cases[f"every token at {mean}"] = torch.full_like(uniform, mean)
        cases[f"uniform in [0, {2 * mean:g}]"] = 2 * mean * uniform
        cases[f"a share of {mean} at 1, the others at 0"] = (uniform < mean).float()
    machine = describe_machine(given.device)
    everything = refined(torch.ones_like(uniform))
    rows, results = [], {}
    for name, levels in cases.items():
        work = refined(levels)
        found = compare(work, everything, device=given.device, rounds=given.rounds)
        rows.append((name, f"{levels.mean():.2f}", work(), everything(), str(found)))
        results[name] = {"mean_level": levels.mean().item(), "nfe": work(), **vars(found)}
    print(machine)
    print(table(("levels", "mean t", "nfe", "nfe at t = 1", "time against t = 1 (10th to 90th percentile)"), rows))
    write_json(given.out, {"machine": machine, "preset": given.preset, "shape": list(shape), "cases": results})


if __name__ == "__main__":
    main()
