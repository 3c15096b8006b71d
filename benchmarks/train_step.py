"""One Evo training step against one causal language model step of the same backbone, batch and length.

    python benchmarks/train_step.py

Two passes, the sketch and the refinement, cost two. Learned levels add a first pass without gradient, and as `evo train` does it, one with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _harness import compare, describe_machine, keep_memory, parser, table, write_json

from evo import Evo, Objective
from evo.core import ClockDensity, Exploration, Extremes
from evo.training import CurriculumConfig
from evo.training.curriculum import objective


def main() -> None:
    options = parser(__doc__ or "", "train_step")
    options.add_argument("--preset", default="tiny")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--rounds", type=int, default=20)
    given = options.parse_args()
    keep_memory()
    draws = torch.Generator(given.device).manual_seed(1)
    torch.manual_seed(0)
    model = Evo.from_preset(given.preset, vocab_size=259).to(given.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (given.batch, given.length)
    tokens = torch.randint(0, 256, shape, device=given.device, generator=draws)
    levels = torch.rand(shape, device=given.device, generator=draws)
    learned = Objective(exploration=Exploration(share=0.0))
    # Half-way through a run.
    trained = objective(CurriculumConfig(), 1, 3, ClockDensity().to(given.device), Extremes().to(given.device))

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def causal() -> None:
        step(F.cross_entropy(model.context_logits(tokens).flatten(0, 1), tokens.flatten()))

    steps: dict[str, Callable[[], None]] = {
        "random levels": lambda: step(model(tokens, levels=levels, generator=draws).loss),
        "learned levels": lambda: step(model(tokens, objective=learned, generator=draws).loss),
        "half of each": lambda: step(model(tokens, generator=draws).loss),
        "as `evo train` does": lambda: step(model(tokens, objective=trained, generator=draws).loss),
    }
    machine = describe_machine(given.device)
    found = {name: compare(work, causal, device=given.device, rounds=given.rounds) for name, work in steps.items()}
    rows = [(name, f"{c.first_ms:.0f} ms", f"{c.second_ms:.0f} ms", str(c)) for name, c in found.items()]
    print(machine)
    print(table(("Evo step with", "Evo", "causal", "ratio (10th to 90th percentile)"), rows))
    results = {name: vars(comparison) for name, comparison in found.items()}
    write_json(given.out, {"machine": machine, "preset": given.preset, "shape": list(shape), "steps": results})


if __name__ == "__main__":
    main()
