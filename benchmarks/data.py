"""What data cost: how full rows are and how many documents are cut, how fast batches are made, and whether a step waits for them.

    python benchmarks/data.py

Documents are the files of a folder (by default the interpreter's standard library) and, for texts that are mostly shorter than a row, their
paragraphs.
"""

from __future__ import annotations

import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import compare, describe_machine, parser, table, write_json

from evo.data import BYTES, Corpus, CorpusConfig, Prefetch, TokenShards, load, write_shards
from evo.data.packing import PACKINGS
from evo.data.sources import survey

LENGTHS = (256, 1024, 4096)


def documents(source: Path) -> Iterator[str]:
    """The texts of a file or folder."""
    for part in survey(source, CorpusConfig(), "").train:
        yield part.read("surrogateescape")


def paragraphs(source: Path) -> Iterator[str]:
    """The same, cut at blank lines."""
    for text in documents(source):
        yield from (part for part in text.split("\n\n") if part.strip())


def packing(name: str, shards: TokenShards) -> list[dict[str, Any]]:
    """Efficiency of each packing at each length."""
    found = []
    for length in LENGTHS:
        for kind, how in PACKINGS.items():
            begun = time.perf_counter()
            rows = how.rows(shards, length)
            prepared = time.perf_counter() - begun
            segments = [rows.segments(row, 0) for row in range(rows.count)]
            stops = np.array([stop for row in segments for _, stop in row])
            ends = np.concatenate(list(shards.all_ends()))
            sizes = np.diff(np.concatenate([[0], ends]))
            cut_in = np.searchsorted(ends, np.setdiff1d(stops, ends), side="right")
            filled = sum(stop - start for row in segments for start, stop in row)
            cut = len(np.unique(cut_in)) / len(ends)
            found.append(
                {
                    "corpus": name,
                    "documents": shards.documents,
                    "mean_length": shards.tokens / shards.documents,
                    "length": length,
                    "packing": kind,
                    "filled": filled / (rows.count * length),
                    "documents_cut": cut,
                    "fewest_cut": float((sizes > length).mean()),
                    "documents_a_row": len(stops) / rows.count,
                    "prepared_s": prepared,
                }
            )
    return found


def loading(corpus: Corpus, rows: int, length: int, device: torch.device) -> dict[str, Any]:
    """Time to make a batch, and a step of half a batch's time or ten times it, with batches made by the step itself and ahead of it."""
    begun, count = time.perf_counter(), 50
    for step in range(count):
        corpus.batch(0, step, range(rows), rows, length)
    made = (time.perf_counter() - begun) / count
    work = 10 * made

    def step_with(batches: Iterator[Any]) -> None:
        next(batches)
        # Stands in for a step on an accelerator, during which the host is idle.
        time.sleep(work)

    steps = (corpus.batch(0, step, range(rows), rows, length) for step in range(10**9))
    with (
        load(corpus, 0, range(10**9), range(rows), rows, length, device=device) as ahead,
        Prefetch(iter(lambda: None, 0)) as nothing,
    ):
        inline = compare(lambda: step_with(steps), lambda: step_with(nothing), device=device, rounds=8, seconds=0.05)
        hidden = compare(lambda: step_with(ahead), lambda: step_with(nothing), device=device, rounds=8, seconds=0.05)
    return {
        "rows": rows,
        "length": length,
        "batch_ms": 1e3 * made,
        "tokens_per_second": rows * length / made,
        "inline": str(inline),
        "ahead": str(hidden),
    }


def main() -> None:
    options = parser(__doc__ or "", "data")
    options.add_argument(
        "--data", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="file or folder of text"
    )
    options.add_argument("--documents", type=int, default=300, help="at most so many, and 30 times as many paragraphs")
    arguments = options.parse_args()
    results: dict[str, Any] = {"machine": describe_machine(arguments.device), "packing": [], "loading": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, texts, many in (("files", documents, 1), ("paragraphs", paragraphs, 30)):
            begun = time.perf_counter()
            shards = write_shards(islice(texts(arguments.data), arguments.documents * many), BYTES, Path(folder, name))
            results[f"written_{name}_mb_per_s"] = shards.bytes / 1e6 / (time.perf_counter() - begun)
            results["packing"] += packing(name, shards)
            for how in PACKINGS.values():
                corpus = Corpus(train=shards, held_out=shards, packing=how)
                results["loading"].append(
                    {"corpus": name, "packing": str(how), **loading(corpus, 64, 1024, arguments.device)}
                )
    header = [
        "corpus",
        "documents",
        "mean",
        "length",
        "packing",
        "filled",
        "cut",
        "fewest",
        "documents a row",
        "index, s",
    ]
    rows = [
        [
            each["corpus"],
            each["documents"],
            f"{each['mean_length']:.0f}",
            each["length"],
            each["packing"],
            f"{each['filled']:.4f}",
            f"{each['documents_cut']:.3f}",
            f"{each['fewest_cut']:.3f}",
            f"{each['documents_a_row']:.1f}",
            f"{each['prepared_s']:.3f}",
        ]
        for each in results["packing"]
    ]
    print(table(header, rows))
    print()
    header = ["corpus", "packing", "batch, ms", "tokens/s", "step that makes its batch", "step with batches made ahead"]
    print(
        table(
            header,
            [
                [
                    each["corpus"],
                    each["packing"],
                    f"{each['batch_ms']:.2f}",
                    f"{each['tokens_per_second']:.2e}",
                    each["inline"],
                    each["ahead"],
                ]
                for each in results["loading"]
            ],
        )
    )
    write_json(arguments.out, results)


if __name__ == "__main__":
    main()
