"""How long training stands still for a checkpoint, written while it waits or in the background.

    python benchmarks/checkpoint.py

Steps with a save among them are timed against the same steps without, so that what a save in the background takes from the steps
that follow counts too. There are enough steps that the background is done before they are.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from _harness import compare, describe_machine, keep_memory, parser, synchronize, table, write_json

from evo import Evo
from evo.training import Checkpointer, OptimizerConfig
from evo.training.state import TrainState


def main() -> None:
    options = parser(__doc__ or "", "checkpoint")
    options.add_argument("--preset", default="small")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--folder", type=Path, default=None, help="on the disk to measure; by default a temporary one")
    given = options.parse_args()
    keep_memory()
    torch.manual_seed(0)
    state = TrainState.begin(Evo.from_preset(given.preset, vocab_size=259).to(given.device), OptimizerConfig())
    tokens = torch.randint(0, 256, (given.batch, given.length), device=given.device)

    def step() -> None:
        state.model(tokens).loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    def steps(count: int) -> None:
        for _ in range(count):
            step()

    results = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for background in (False, True):
            with Checkpointer(Path(folder), keep=1, background=background) as checkpointer:
                steps(2)
                written = _seconds(given.device, lambda: (checkpointer.save(state, corpus=""), checkpointer.wait()))
                count = max(2, 1 + round(2 * written / _seconds(given.device, step)))
                calls: list[float] = []

                def with_save(
                    checkpointer: Checkpointer = checkpointer, calls: list[float] = calls, count=count
                ) -> None:
                    calls.append(_seconds(given.device, lambda: checkpointer.save(state, corpus="")))
                    steps(count)
                    checkpointer.wait()

                found = compare(
                    with_save, lambda count=count: steps(count), device=given.device, rounds=given.rounds, seconds=0
                )
            results["background" if background else "blocking"] = {
                "call_ms": 1e3 * statistics.median(calls),
                "write_ms": 1e3 * written,
                "extra_ms": found.first_ms - found.second_ms,
                "steps": count,
                **vars(found),
            }
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())
    machine = describe_machine(given.device)
    rows = [
        (
            name,
            f"{f['call_ms']:.0f} ms",
            f"{f['extra_ms']:.0f} ms",
            f"{f['ratio']:.3f} ({f['low']:.3f} to {f['high']:.3f})",
        )
        for name, f in results.items()
    ]
    print(machine)
    print(f"{size / 2**20:.0f} MiB of state, {results['blocking']['write_ms']:.0f} ms to write")
    header = ("save", "the call", "more time than without", "steps with a save / without (10th to 90th percentile)")
    print(table(header, rows))
    write_json(given.out, {"machine": machine, "preset": given.preset, "bytes": size, "saves": results})


def _seconds(device: torch.device, work) -> float:
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
