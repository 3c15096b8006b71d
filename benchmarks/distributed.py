"""What the loop of training costs beside its step, what sharding costs beside copies, and the paper's run on paper.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --device cuda --preset small --ranks 2

Three parts: a `Trainer` against the same step written out, in one process; sharded weights (FSDP2) against copies (DDP) on `--ranks`
processes, in turn, step by step; and the arithmetic of the paper's XL on 256 A100, compute against communication. How long a save stops
training is in `benchmarks/checkpoint.py`, packing in `benchmarks/data.py`, and the rate of a step in `benchmarks/utilisation.py`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _harness import compare, describe_machine, keep_memory, parser, synchronize, table, write_json
from torch.nn.utils import clip_grad_norm_

from evo import Evo
from evo.core.config import preset
from evo.data import load
from evo.training import Ema, ParallelConfig, TrainConfig, Trainer, adamw
from evo.training.budget import budget
from evo.training.curriculum import objective

GIB = 2**30


def main() -> None:
    options = parser(__doc__ or "", "distributed")
    options.add_argument("--preset", default="tiny")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--rounds", type=int, default=20)
    given = options.parse_args()
    keep_memory()
    results: dict[str, Any] = {"machine": describe_machine(given.device)}
    print(results["machine"])
    results["loop"] = loop(given)
    if given.ranks > 1:
        results["ranks"] = ranks(given)
    results["paper"] = on_paper()
    write_json(given.out, results)


def config(given: Any, folder: Path, **changes: Any) -> TrainConfig:
    """A run on random text, in the middle of it: levels are learned."""
    source = folder / "text.txt"
    if not source.exists():
        draws = torch.Generator().manual_seed(0)
        source.write_bytes(bytes(torch.randint(32, 127, (1 << 20,), generator=draws).tolist()))
    base = TrainConfig(
        data=source,
        out=folder / "run",
        preset=given.preset,
        batch_size=given.batch,
        length=given.length,
        device=str(given.device),
        precision="fp32",
        progress=False,
        steps=10**6,
        peak_tflops=1.0,
    )
    return replace(base, curriculum=replace(base.curriculum, explore_alone=0.0, window=0.0, suffix=0.0), **changes)


def loop(given: Any) -> dict[str, Any]:
    """A step of the trainer, with data, figures and average, against forward, backward, clipping, optimizer and average alone."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config(given, Path(folder)))
        asked, state, device = trainer.config, trainer.state, given.device
        waited: list[float] = []
        with load(
            trainer.data, 0, range(10**6), trainer.share.rows, asked.batch_size, asked.length, device=device
        ) as batches:

            def timed() -> Any:
                while True:
                    begun = time.perf_counter()
                    batch = next(batches)
                    waited.append(time.perf_counter() - begun)
                    yield batch

            stream = timed()
            packed = trainer.data.batch(0, 0, trainer.share.rows, asked.batch_size, asked.length).to(device)
            torch.manual_seed(0)
            model = Evo.from_preset(given.preset, vocab_size=trainer.data.vocabulary).to(device).train()
            ema, optimizer = Ema(model, 0.9999), adamw(model, asked.optimizer)
            draws, steps = torch.Generator(device).manual_seed(0), iter(range(10**9))
            demand = objective(asked.curriculum, 0, asked.steps, state.clock, state.extremes)

            def bare() -> None:
                model(packed.tokens, documents=packed.documents, generator=draws, objective=demand).loss.backward()
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                ema.update(model, next(steps))

            found = compare(lambda: trainer.step(stream), bare, device=device, rounds=given.rounds)
        trainer.saved.close()
    wait = 1e3 * statistics.median(waited)
    print(table(("trainer's step", "bare step", "ratio (10th to 90th percentile)", "of it waiting for data"),
                [(f"{found.first_ms:.1f} ms", f"{found.second_ms:.1f} ms", str(found), f"{wait:.3f} ms")]))  # fmt: skip
    return {**vars(found), "waiting_ms": wait}


def ranks(given: Any) -> dict[str, Any]:
    """Milliseconds of a step with copies and with shards, measured by the first rank."""
    with tempfile.TemporaryDirectory() as folder:
        config(given, Path(folder))
        mp.spawn(_rank, (given, Path(folder)), nprocs=given.ranks)
        found = json.loads((Path(folder) / "found.json").read_text())
    print(table(("ranks", "copies (DDP)", "shards (FSDP2)", "shards in units of copies (10th to 90th percentile)"),
                [(given.ranks, f"{found['copies']:.1f} ms", f"{found['shards']:.1f} ms",
                  f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f})")]))  # fmt: skip
    return found


def _rank(rank: int, given: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    device = torch.device(given.device.type, rank) if given.device.type != "cpu" else given.device
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank)
    dist.init_process_group(init_method=f"file://{folder / 'store'}", rank=rank, world_size=given.ranks)
    keep_memory()
    kinds = {"copies": ParallelConfig(replicate=given.ranks), "shards": ParallelConfig(shard=given.ranks)}
    runs = {}
    for name, parallel in kinds.items():
        asked = config(given, folder, out=folder / name, parallel=parallel, batch_size=given.ranks * given.batch)
        runs[name] = Trainer(asked, device=device)
    batch = {
        name: cycle([run.data.batch(0, 0, run.share.rows, run.config.batch_size, given.length)])
        for name, run in runs.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(given.rounds + 1):
        for name in sorted(runs, reverse=bool(turn % 2)):
            dist.barrier()
            begun = time.perf_counter()
            runs[name].step(batch[name])
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - begun))
    measured = {name: values[1:] for name, values in times.items()}
    ratios = [b / a for a, b in zip(measured["copies"], measured["shards"], strict=True)]
    tenths = statistics.quantiles(ratios, n=10)
    if rank == 0:
        found = {name: statistics.median(values) for name, values in measured.items()}
        found |= {"ratio": statistics.median(ratios), "low": tenths[0], "high": tenths[-1]}
        (folder / "found.json").write_text(json.dumps(found))
    for run in runs.values():
        run.saved.close()
    dist.destroy_process_group()


def on_paper(gpus: int = 256, node: int = 8, link: float = 25e9, nvlink: float = 300e9) -> dict[str, Any]:
    """The paper's XL: 4 M tokens a step of 4 K, 3.4 T in all, on A100 of 80 GB at 312 TFLOP/s in bf16.

    Weights are gathered in bf16 at each of three passes forward and each back (clean, sketch, refinement), gradients scattered in fp32
    after each back, ring algorithms at `link` bytes a second between nodes (200 Gb/s a GPU) and `nvlink` inside. Communication that is not
    longer than computing can be hidden behind it.
    """
    asked = preset("XL", vocab_size=65536)
    demand = objective(TrainConfig(data=Path()).curriculum, 1, 3)
    rows, results = [], []
    for name, shard in (("shards over all", gpus), (f"shards over {node}, copies over nodes", node)):
        for micro_batch in (1, 2, 4):
            passes = 1024 // (gpus * micro_batch)
            try:
                found = budget(
                    asked, gpus=shard, gpu_bytes=0.9 * 80 * GIB, peak_flops=312e12, utilisation=0.4,
                    length=4096, micro_batch=micro_batch, accumulate=passes, objective=demand,
                )  # fmt: skip
            except ValueError as error:
                rows.append((name, micro_batch, passes, *["-"] * 4, str(error).partition(":")[0]))
                continue
            weights, gradients = (2 * found.parameters.total, 4 * found.parameters.total)
            part = (shard - 1) / shard
            sharded = passes * part * (6 * weights + 3 * gradients) / (nvlink if shard <= node else link)
            copies = gpus // shard
            copied = 2 * (copies - 1) / copies * gradients / shard / link
            communication = sharded + copied
            computing = found.seconds_per_step
            step = max(computing, communication)
            tokens = 1024 * 4096 / step
            days = 3.4e12 / tokens / 86_400
            bound = "computing" if computing >= communication else "links"
            rows.append((name, micro_batch, passes, f"{found.used_bytes / GIB:.0f} GiB", f"{computing:.1f} s", f"{communication:.1f} s",
                         f"{tokens:,.0f}", f"{days:.0f} days, bound by {bound}"))  # fmt: skip
            results.append({"layout": name, "micro_batch": micro_batch, "passes": passes, "memory_bytes": found.used_bytes,
                            "computing_seconds": computing, "communication_seconds": communication,
                            "tokens_per_second": tokens, "days": days})  # fmt: skip
    header = (
        "XL on 256 A100",
        "sequences a pass",
        "passes",
        "memory",
        "computing",
        "communication",
        "tokens/s",
        "3.4 T tokens",
    )
    print(table(header, rows))
    return {"assumed": {"utilisation": 0.4, "link": link, "nvlink": nvlink}, "layouts": results}


if __name__ == "__main__":
    main()
