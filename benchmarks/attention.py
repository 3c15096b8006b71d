"""Attention backends at growing lengths: time against a dense mask, and peak memory, forward and backward.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --dtype bfloat16 --batch 4 --heads 16 --kv-heads 4

The reference of every ratio is `scaled_dot_product_attention` with the mask as a matrix. Time is that of one layer whose pattern has been
lowered by an earlier one; memory is that of the pass, lowering included, beyond its queries, keys and values. On a CPU memory is the peak
of the resident set, which Linux alone lets a process reset.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from _harness import compare, describe_machine, parser, synchronize, table, write_json
from torch import Tensor

from evo.core import BlockCausal, Call, Causal, Document, Flex, Mask, Pattern, Sdpa, Window, Xformers, auto
from evo.core.backends import Backend


@dataclass(frozen=True)
class Dense(Sdpa):
    """The reference: the mask as a matrix, whatever it is."""

    name: ClassVar[str] = "dense"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float = 0.0) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=pattern.matrix, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )


def masks(batch: int, length: int, device: torch.device) -> dict[str, Mask]:
    eighths = [[length // 8] * 8] * batch
    starts = torch.arange(batch, device=device) * length // (2 * batch) + 1
    return {
        "causal": Causal(),
        "window": Window(length // 4),
        "blocks of 128": BlockCausal(128, 1),
        "8 documents": Document.from_lengths(eighths, device) & Causal(),
        "windows that differ": Window(starts),
    }


def main() -> None:
    options = parser(__doc__ or "", "attention")
    options.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--heads", type=int, default=4)
    options.add_argument("--kv-heads", type=int, default=2)
    options.add_argument("--head-dim", type=int, default=64)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    results = []
    for length in arguments.lengths:
        for name, mask in masks(arguments.batch, length, device).items():
            for gradient in (False, True):
                shape = (arguments.batch, length, arguments.heads, arguments.head_dim)
                few = (*shape[:2], arguments.kv_heads, shape[3])
                tensors = [
                    torch.randn(size, device=device, dtype=dtype).transpose(1, 2).requires_grad_(gradient)
                    for size in (shape, few, few)
                ]
                results += measure(name, mask, length, tensors, gradient, device, arguments.rounds)
                print(lines(results[-len(BACKENDS) :]), flush=True)
    print(table(HEADER, [row(found) for found in results]))
    settings = {**vars(arguments), "device": str(device)}
    del settings["out"]
    write_json(arguments.out, {"machine": describe_machine(device), "settings": settings, "results": results})


BACKENDS: tuple[Backend, ...] = (Sdpa(), Xformers(), Flex())
HEADER = ("mask", "length", "pass", "backend", "ms", "to a dense mask", "MiB", "MiB, dense mask", "auto")


def measure(
    name: str, mask: Mask, length: int, tensors: list[Tensor], gradient: bool, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """What each backend takes for one pass over a sequence that attends to itself."""
    q, k, v = tensors

    def pattern() -> Pattern:
        return Pattern(mask=mask, queries=0, count=length, keys=length, batch=len(q), device=device)

    def work(backend: Backend, made: Pattern) -> Callable[[], object]:
        def once() -> None:
            out = backend(q, k, v, made)
            if gradient:
                torch.autograd.grad(out, tensors, torch.ones_like(out))

        return once

    def peak(backend: Backend) -> float | None:
        return peak_mebibytes(lambda: work(backend, pattern())(), device)

    dense = Dense()
    reference = work(dense, pattern())
    reference()
    dense_peak = peak(dense)
    found = []
    for backend in BACKENDS:
        call = Call.of(q, k, v, pattern())
        entry: dict[str, Any] = {
            "mask": name,
            "length": length,
            "pass": "forward and backward" if gradient else "forward",
            "backend": backend.name,
            "auto": auto.choose(call).name == backend.name,
        }
        against = backend.reasons_against(call)
        # Unfused, on a CPU, it would be measured as what it is not.
        if against or (backend == Flex() and device.type == "cpu"):
            entry["not measured"] = "; ".join(against) or "unfused on cpu"
        else:
            timed = compare(work(backend, pattern()), reference, device=device, rounds=rounds)
            entry |= {"ms": timed.first_ms, "ratio": timed.ratio, "low": timed.low, "high": timed.high}
            entry |= {"mebibytes": peak(backend), "mebibytes of a dense mask": dense_peak}
        found.append(entry)
    return found


def peak_mebibytes(work: Callable[[], object], device: torch.device) -> float | None:
    """Memory that `work` takes at most beyond what is in use before; None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if platform.libc_ver()[0] == "glibc":
        # What was freed but is kept would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 2**10


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def row(found: dict[str, Any]) -> list[str]:
    head = [found["mask"], str(found["length"]), found["pass"], found["backend"]]
    if "not measured" in found:
        return [*head, "", "", "", "", found["not measured"]]
    ratio = f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
    memory = ["?" if x is None else f"{x:.0f}" for x in (found["mebibytes"], found["mebibytes of a dense mask"])]
    return [*head, f"{found['ms']:.1f}", ratio, *memory, "chosen" if found["auto"] else ""]


def lines(results: list[dict[str, Any]]) -> str:
    return "\n".join("  ".join(row(found)) for found in results)


if __name__ == "__main__":
    main()
