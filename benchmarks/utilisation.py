"""How much of the rate of plain matrix products a training step reaches, both measured in turn in one process.

    python benchmarks/utilisation.py --device cuda --compile
    python benchmarks/utilisation.py --device cuda --compile --sizes 1B --batch 8

A step is the bound with its gradients, and fused AdamW; products are in bfloat16 (autocast) where the device gains by it, else in float32.
Operations are counted on paper (`evo.training.flops`): products of matrices alone, attention over all keys. The rate is that of one
square product in the same precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from _harness import compare, describe_machine, keep_memory, parser, table, write_json

from evo import EvoConfig, Objective
from evo.training.flops import Flops
from evo.training.precision import multiplies_bf16

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"width": 128, "depth": 4, "heads": 2},
    "100M": {"width": 768, "depth": 12, "heads": 6},
    "350M": {"width": 1280, "depth": 16, "heads": 10},
    "1B": {"width": 2048, "depth": 20, "heads": 16},
}


def main() -> None:
    options = parser(__doc__ or "", "utilisation")
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=["100M", "350M", "1B"])
    options.add_argument("--vocab", type=int, default=32_768)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=1024)
    options.add_argument("--square", type=int, default=8192, help="side of the matrices whose product is the measure")
    options.add_argument("--compile", action="store_true")
    options.add_argument("--rounds", type=int, default=10)
    given = options.parse_args()
    keep_memory()
    machine, results = describe_machine(given.device), []
    for name in given.sizes:
        results.append(measure(name, given))
        print(name, results[-1], flush=True)
    columns = ("size", "parameters", "step, ms", "product, ms", "TFLOP/s", "utilisation", "low", "high")
    rows = [
        (
            found["size"],
            f"{found['parameters'] / 1e6:.0f} M",
            f"{found['step_ms']:.1f}",
            f"{found['product_ms']:.2f}",
            f"{found['tflops_per_second']:.2f}",
            *(f"{found[key]:.1%}" for key in ("utilisation", "low", "high")),
        )
        for found in results
    ]
    print(machine)
    print(table(columns, rows))
    settings = {**vars(given), "device": str(given.device)}
    del settings["out"]
    write_json(given.out, {"machine": machine, "settings": settings, "results": results})


def measure(name: str, given: Any) -> dict[str, Any]:
    """Time of a step in units of a product; operations over time, in units of the product's, is the utilisation."""
    device, objective = given.device, Objective()
    torch.manual_seed(0)
    config = EvoConfig(**SIZES[name], vocab_size=given.vocab, context=given.length, dropout=0.0)
    model = config.build().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, given.vocab, (given.batch, given.length), device=device)
    run = torch.compile(model) if given.compile else model
    narrow = multiplies_bf16(device)
    dtype = torch.bfloat16 if narrow else torch.float32
    left, right = (torch.randn(given.square, given.square, device=device, dtype=dtype) for _ in range(2))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            loss = run(tokens, objective=objective).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    timed = compare(step, lambda: left @ right, device=device, rounds=given.rounds)
    work = Flops.of(config).training(objective, sequences=given.batch, length=given.length)
    products = work / (2 * given.square**3)
    return {
        "size": name,
        "products_in": str(dtype),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step_ms": timed.first_ms,
        "product_ms": timed.second_ms,
        "tflops_per_second": work / timed.first_ms / 1e9,
        "utilisation": products / timed.ratio,
        "low": products / timed.high,
        "high": products / timed.low,
    }


if __name__ == "__main__":
    main()
