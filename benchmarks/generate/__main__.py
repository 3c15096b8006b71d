"""The command: options, parts in turn, tables, a picture for each shape, one JSON file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import describe_machine, keep_memory, parser, table, write_json
from benchmarks.generate import __doc__ as description
from benchmarks.generate.anatomy import REST, anatomy, floor, passes, rates
from benchmarks.generate.frontier import Point, draw, frontier, verdict
from benchmarks.generate.overhead import overhead
from benchmarks.generate.quality import quality
from benchmarks.generate.rivals import Sampled, prompts, sampled, timed, writers
from benchmarks.generate.training import Recipe, text_of, trained_judge, trained_model
from benchmarks.generate.ways import AUTOREGRESSION, options_by_name
from evo import Evo
from evo.heads import NucleusPrior

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
EXPLAINED = (
    AUTOREGRESSION,
    "speculation, run 4",
    "learned t, windows of 16",
    "learned t, windows of 16, stride 16",
    "diffusion, K = 5",
)


def arguments() -> argparse.Namespace:
    """The options."""
    options = parser(description or "", "generate")
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    parts = ("rivals", "anatomy", "overhead")
    options.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options.add_argument("--model", type=Path, help="a saved model of bytes; trained here by default")
    options.add_argument("--judge", type=Path, help="a saved model of the same vocabulary; trained here by default")
    options.add_argument("--new", type=int, nargs="+", default=[64, 256], help="new tokens")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options.add_argument("--long", action="store_true", help="1024 new tokens too")
    options.add_argument("--prompt", type=int, default=32)
    options.add_argument("--samples", type=int, default=32, help="written by each way, to be judged")
    options.add_argument("--ways", default="", help="only ways whose name contains this")
    options.add_argument("--steps", type=int, default=20, help="K")
    options.add_argument("--temperature", type=float, default=0.7)
    options.add_argument("--top-p", type=float, default=0.9)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, help="of the CPU")
    options.add_argument("--scratch", type=Path, default=Path(__file__).parents[1] / "out" / "generate")
    training = options.add_argument_group("training, where a model is not there yet", Recipe.__doc__)
    for each in fields(Recipe):
        training.add_argument(f"--{each.name.replace('_', '-')}", type=type(each.default), default=each.default)
    return options.parse_args()


def load() -> float | None:
    """How many processes want a core, where the system says so."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def main() -> None:
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    keep_memory()
    recipe = Recipe(**{each.name: getattr(given, each.name) for each in fields(Recipe)})
    folder, device = given.scratch / recipe.name, given.device
    model = Evo.from_pretrained(given.model).to(device) if given.model else trained_model(recipe, folder, device)
    if given.long:
        given.new.append(1024)
    machine = describe_machine(device)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(f"{machine['device']}, {machine['threads']} threads, load {load()}; weights of {size / 1e6:.1f} MB")
    measure: Mapping[str, Callable[[argparse.Namespace, Recipe, Path, Evo], Iterator[dict[str, Any]]]] = {
        "rivals": _rivals,
        "anatomy": _anatomy,
        "overhead": _overhead,
    }
    results = {
        "machine": machine,
        "load": [load()],
        "recipe": asdict(recipe),
        "settings": {name: str(value) for name, value in vars(given).items()},
        "weights_bytes": size,
    }
    for part in given.parts:
        results[part] = []
        for entry in measure[part](given, recipe, folder, model):
            results[part].append(entry)
            results["load"].append(load())
            # What has been found is kept, whatever becomes of the rest.
            write_json(given.out, results)


def _rivals(given: argparse.Namespace, recipe: Recipe, folder: Path, model: Evo) -> Iterator[dict[str, Any]]:
    device = given.device
    judge = Evo.from_pretrained(given.judge).to(device) if given.judge else trained_judge(recipe, folder, device)
    text = text_of(recipe).test
    how = {"steps": given.steps, "temperature": given.temperature, "top_p": given.top_p, "like": given.ways}
    with writers(model, **how) as ways:
        for new in given.new:
            prompt, after = prompts(text, given.samples, given.prompt, new, device)
            reference = quality(judge, prompt.cpu(), after.cpu())
            judged = {name: sampled(model, judge, write, prompt, new, 16) for name, write in ways.items()}
            for batch in given.batch:
                speeds = dict(timed(ways, prompt[:batch], new, given.rounds))
                points = [Point(name=name, speed=speeds[name].ratio, quality=judged[name].quality) for name in speeds]
                best = {point.name for point in frontier(points)}
                shape = f"{new} new tokens behind {given.prompt}, batch {batch}"
                print(f"\n{shape}; held-out text: {reference.bits:.3f} ± {reference.error:.3f} bits a byte,")
                print(
                    f"entropy {reference.entropy:.3f}, {reference.distinct:.2f} of runs of 4 distinct; load {load()}\n"
                )
                rows, entries = [], []
                for point in sorted(points, key=lambda point: -point.speed):
                    each, speed = judged[point.name], speeds[point.name]
                    per_second = 1e3 * batch * new / speed.second_ms
                    mark = "yes" if point.name in best else ""
                    rows.append([point.name, f"{per_second:.0f}", speed, *_cells(each), mark])
                    entries.append(
                        {
                            "way": point.name,
                            "tokens_per_second": per_second,
                            "speed_up": vars(speed),
                            "frontier": point.name in best,
                            **each.to_json(),
                        }
                    )
                print(table(_HEAD, rows))
                said = verdict(points, next(point for point in points if point.name == AUTOREGRESSION))
                print(f"\n{said}")
                try:
                    draw(points, reference, shape, given.out.with_name(f"{given.out.stem}-{new}x{batch}.png"))
                except ImportError as reason:
                    print(reason)
                yield {"new": new, "batch": batch, "text": asdict(reference), "ways": entries, "verdict": said}


_HEAD = (
    "way",
    "tokens/s",
    "speed / autoregression's",
    "bits a byte",
    "entropy",
    "distinct",
    "mean t",
    "accepted",
    "passes a position",
    "rows a token",
    "frontier",
)


def _cells(each: Sampled) -> list[str]:
    of = each.quality
    numbers = (each.level, each.accepted, each.passes, each.rows)
    return [
        f"{of.bits:.3f} ± {of.error:.3f}",
        f"{of.entropy:.3f}",
        f"{of.distinct:.2f}",
        *("" if number is None else f"{number:.2f}" for number in numbers),
    ]


def _anatomy(given: argparse.Namespace, recipe: Recipe, _folder: Path, model: Evo) -> Iterator[dict[str, Any]]:
    text, new, prior = (
        text_of(recipe).test,
        given.new[0],
        NucleusPrior(temperature=given.temperature, top_p=given.top_p),
    )
    for batch in given.batch:
        prompt, _ = prompts(text, batch, given.prompt, new, given.device)
        reading, computing = rates(model)
        measured = passes(model, prompt, SIZES)
        print(
            f"\nA pass, batch {batch}: the machine reads {reading / 1e9:.1f} GB/s and makes {computing / 1e9:.0f} GFLOP/s"
        )
        least = {count: floor(model, batch * count, reading, computing) for count in SIZES}
        rows = [
            (n, f"{ms:.2f} ms", f"{least[n]:.2f} ms", f"{ms / least[n]:.2f}", f"{ms / measured[1]:.2f}")
            for n, ms in measured.items()
        ]
        print(table(("tokens", "measured", "floor", "ratio", "in units of one token"), rows))
        entry: dict[str, Any] = {
            "batch": batch,
            "bytes_per_second": reading,
            "operations_per_second": computing,
            "passes": [{"tokens": n, "ms": ms, "floor_ms": least[n]} for n, ms in measured.items()],
        }
        shares: dict[str, dict[str, float]] = {}
        known = options_by_name(given.steps)
        for name in EXPLAINED:
            shares[name] = anatomy(model, prompt, new, prior, known[name], rounds=given.rounds)
        head = list(next(iter(shares.values())))
        print(f"\nWhere the time goes, {new} new tokens, batch {batch}\n")
        rows = [
            (name, f"{sum(parts.values()):.0f} ms", *(f"{parts[part] / sum(parts.values()):.0%}" for part in head))
            for name, parts in shares.items()
        ]
        print(table(("way", "time", *head), rows))
        yield {**entry, "parts_ms": shares, "rest": REST}


def _overhead(given: argparse.Namespace, recipe: Recipe, _folder: Path, model: Evo) -> Iterator[dict[str, Any]]:
    text, new = text_of(recipe).test, given.new[0]
    for batch in given.batch:
        prompt, _ = prompts(text, batch, given.prompt, new, given.device)
        found = overhead(model, prompt, new, given.rounds)
        print(f"\nLevel 0 against the barest loop, {new} new tokens, batch {batch}\n")
        rows = [
            (kind, name, f"{1e3 * batch * new / ratio.first_ms:.0f}", ratio) for (kind, name), ratio in found.items()
        ]
        print(table(("prior", "generate", "tokens/s", "time / barest loop's"), rows))
        yield {
            "batch": batch,
            "ways": [{"prior": kind, "way": name, **vars(ratio)} for (kind, name), ratio in found.items()],
        }


if __name__ == "__main__":
    main()
