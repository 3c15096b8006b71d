"""Rendered tables and plots of the results on disk.

python -m benchmarks.ablation.report planning
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks._harness import table
from benchmarks.ablation.run import Places
from benchmarks.ablation.scoring import SUREST_FIRST, WRITTEN_AT
from evo.files import write_text

Result = Mapping[str, Any]

# The variants that others are set beside.
FIXED = ("t0", "t1")


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    """All finished rows of a table. Raises FileNotFoundError if there are none."""
    files = sorted((folder / name).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder / name} has no finished rows: run benchmarks.ablation.{name} first")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def over_seeds(values: Iterable[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds; of a single seed the value alone, of none a dash."""
    found = list(values)
    if not found:
        return "–"
    mean = f"{statistics.mean(found):.{digits}f}"
    return f"{mean} ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else mean


def pairs(group: Iterable[Result], others: Iterable[Result]) -> list[tuple[Result, Result]]:
    """Rows of two groups that have a seed in common, and so began with the same weights and saw the same batches."""
    of = {row["row"]["seed"]: row for row in others}
    return [(row, of[row["row"]["seed"]]) for row in group if row["row"]["seed"] in of]


def difference(found: Iterable[tuple[Result, Result]], figure: Callable[[Result], float]) -> str:
    """Mean of a figure's differences within pairs, at least one, ± its standard error; of a single pair the difference alone."""
    values = [figure(row) - figure(other) for row, other in found]
    mean = f"{statistics.mean(values):+.3f}"
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else mean


def grouped(
    rows: Iterable[Result], key: Callable[[Mapping[str, Any]], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[Result]]:
    """Results with equal `key` of their settings: those that differ in the seed alone."""
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for row in rows:
        groups[key(row["row"])].append(row)
    return dict(groups)


def kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What rows of one line have in common: task, size, training examples, budget, variant with its label."""
    variant = f"{row['variant']} ({row['label']})" if row["label"] else row["variant"]
    return row["task"], row["size"], row["train_size"] or 0, row["budget"], variant


def named(key: tuple[Any, ...]) -> list[object]:
    """A `kind` as the first cells of a line."""
    task, size, examples, budget, variant = key
    return [task, size, examples or "–", _short(budget), variant]


def heading(key: tuple[Any, ...]) -> str:
    """A `kind` as the title of a panel, without its size."""
    task, _, examples, budget, variant = key
    return ", ".join([task, *([f"{examples} examples"] if examples else []), f"{_short(budget)} tokens", variant])


def commands(rows: Iterable[Result]) -> list[str]:
    """The commands that made the rows, as the end of a page."""
    return ["Made by", "", *(f"    {line}" for line in sorted({row["command"] for row in rows})), ""]


def rendered(folder: Path, name: str) -> str:
    """The table in Markdown, one line for each kind of row."""
    rows = results(folder, name)
    planning = any("accuracy" in row for row in rows)
    unit = "bits an answer token" if planning else "bits a byte"
    header = ["task", "size", *(["examples"] if planning else []), "tokens", "variant", "seeds"]
    if planning:
        header += ["accuracy", "at t ≡ 0", "at t ≡ 1", "the surest first"]
    written = any("samples" in row for row in rows)
    header += [f"bound, {unit}", "at t ≡ 0", "at t ≡ ½", "at t ≡ 1", "mean t"]
    if written:
        header += ["perplexity of samples (of text)", "their entropy, bits (of text)"]
    header += ["parameters", "TFLOP", "minutes", "machine"]
    lines = []
    for (task, size, examples, budget, variant), group in sorted(grouped(rows, kind).items()):
        line: list[object] = [task, size, *([examples] if planning else []), _short(budget), variant, len(group)]
        if planning:
            for at in (*WRITTEN_AT, SUREST_FIRST):
                line.append(over_seeds(row["accuracy"][at]["accuracy"] for row in group))
        line += [over_seeds(row["bound"][at]["bits"] for row in group) for at in ("own", "0", "0.5", "1")]
        line.append(over_seeds((row["bound"]["own"]["mean_level"] for row in group), 2))
        if written:
            for figure, digits in (("perplexity", 1), ("entropy", 2)):
                text = group[0]["samples"]["text"][figure]
                line.append(
                    f"{over_seeds((row['samples']['own'][figure] for row in group), digits)} ({text:.{digits}f})"
                )
        line.append(_short(group[0]["training"]["parameters"]))
        line.append(f"{statistics.mean(row['training']['flops'] for row in group) / 1e12:.2f}")
        line.append(f"{statistics.mean(row['training']['seconds'] for row in group) / 60:.1f}")
        line.append(" / ".join(sorted({row["machine"]["device"] for row in group})))
        lines.append(line)
    return "\n".join(["# " + name, "", table(header, lines), "", *_differences(rows, unit), *commands(rows)])


def _differences(rows: list[dict[str, Any]], unit: str) -> list[str]:
    """What each kind of row has beyond rows at a fixed level that are otherwise like it, as a section of a page."""
    figures: dict[str, Callable[[Result], float]] = {unit: lambda row: row["bound"]["own"]["bits"]}
    if "accuracy" in rows[0]:
        figures = {"accuracy": lambda row: row["accuracy"]["own"]["accuracy"], **figures}
    groups, lines = grouped(rows, kind), []
    for key, group in sorted(groups.items()):
        settings = group[0]["row"]
        if settings["variant"] in FIXED:
            continue
        for fixed in FIXED:
            found = pairs(group, groups.get(kind({**settings, "variant": fixed}), []))
            if found:
                lines.append([*named(key), fixed, len(found), *(difference(found, each) for each in figures.values())])
    if not lines:
        return []
    header = ["task", "size", "examples", "tokens", "variant", "less", "pairs", *figures]
    return ["Differences, seed by seed (mean ± standard error):", "", table(header, lines), ""]


def plot(folder: Path, name: str, target: Path) -> None:
    """One panel a task: accuracy, or bits, of each variant with a mark for every seed; against the training set where sizes differ."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results(folder, name)
    tasks = sorted({(row["row"]["task"], row["row"]["size"], row["row"]["budget"]) for row in rows})
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 4), squeeze=False, layout="constrained")
    for axis, (task, size, budget) in zip(axes[0], tasks, strict=True):
        here = [r for r in rows if (r["row"]["task"], r["row"]["size"], r["row"]["budget"]) == (task, size, budget)]
        planning = "accuracy" in here[0]
        groups = grouped(here, lambda row: (kind(row)[-1], row["train_size"] or 0))
        sizes = sorted({examples for _, examples in groups})
        variants = sorted({variant for variant, _ in groups})

        def value(row: Result, planning: bool = planning) -> float:
            return row["accuracy"]["own"]["accuracy"] if planning else row["bound"]["own"]["bits"]

        for place, variant in enumerate(variants):
            if len(sizes) > 1:
                known = [examples for examples in sizes if (variant, examples) in groups]
                means = [statistics.mean(map(value, groups[variant, examples])) for examples in known]
                axis.plot(known, means, marker="o", label=variant)
            else:
                values = [value(row) for row in groups[variant, sizes[0]]]
                axis.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.5)
                axis.plot([place - 0.3, place + 0.3], [statistics.mean(values)] * 2, color="black")
        if len(sizes) > 1:
            axis.set(xscale="log", xlabel="training examples")
            axis.legend(fontsize=7)
        else:
            axis.set_xticks(range(len(variants)), variants, rotation=90, fontsize=8)
        axis.set(title=f"{task}, {size}, {_short(budget)} tokens", ylabel="accuracy" if planning else "bits a byte")
        if planning:
            axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def write_report(folder: Path, name: str) -> str:
    """Write `<name>.md` and `<name>.png` beside the results of a table in `folder`; the table."""
    text = rendered(folder, name)
    write_text(folder / f"{name}.md", text)
    plot(folder, name, folder / f"{name}.png")
    return text


def _short(number: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:g}"


if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(write_report(Places().results, each))
