"""Where t goes, as tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import table
from benchmarks.ablation.report import Result, commands, grouped, heading, kind, named, over_seeds, results
from evo.files import write_text


def write_report(folder: Path, name: str) -> str:
    """Write `<name>.md` and `<name>.png` beside the results of a table in `folder`; the tables."""
    groups = sorted(grouped(results(folder, name), kind).items())
    text = _rendered(name, groups)
    write_text(folder / f"{name}.md", text)
    _plot(groups, folder / f"{name}.png")
    return text


def _rendered(name: str, groups: Sequence[tuple[tuple[Any, ...], list[Result]]]) -> str:
    overall, by_class = [], []
    for key, rows in groups:
        correlations = [
            over_seeds([row["rank_correlation"][of] for row in rows if row["rank_correlation"][of] is not None])
            for of in ("entropy", "clean_entropy")
        ]
        means = (_mean(rows, lambda row, name=name: row[name]) for name in ("mean_level", "realised"))
        overall.append([*named(key), len(rows), *means, *correlations])
        for each in dict.fromkeys(each for row in rows for each in row["classes"]):
            having = [row["classes"][each] for row in rows if each in row["classes"]]
            figures = ("share", "mean_level", "highest", "entropy")
            by_class.append(
                [*named(key), each, *(_mean(having, lambda found, name=name: found[name]) for name in figures)]
            )
    head = ["task", "size", "examples", "tokens", "variant"]
    return "\n".join(
        [
            f"# {name}",
            "",
            table(
                [
                    *head,
                    "seeds",
                    "mean t",
                    "share at t = 0",
                    "rank correlation with entropy",
                    "with entropy of a clean context",
                ],
                overall,
            ),
            "",
            table(
                [
                    *head,
                    "class",
                    "share of tokens",
                    "mean t",
                    "share of sequences with their highest t here",
                    "entropy, bits",
                ],
                by_class,
            ),
            "",
            *commands([row for _, rows in groups for row in rows]),
        ]
    )


def _mean(rows: Sequence[Result], value: Callable[[Result], float]) -> str:
    return over_seeds(map(value, rows))


def _plot(groups: Sequence[tuple[tuple[Any, ...], list[Result]]], target: Path) -> None:
    """A line of panels for each kind of row: mean t by position, by class, and against entropy; a curve or a mark for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(groups), 3, figsize=(12, 3.2 * len(groups)), squeeze=False, sharey=True, layout="constrained"
    )
    for (position, by_class, entropy), (key, rows) in zip(axes, groups, strict=True):
        for row in rows:
            position.plot([each["mean_level"] for each in row["positions"]], marker=".")
            by_class.plot(
                list(row["classes"]), [each["mean_level"] for each in row["classes"].values()], "o", alpha=0.6
            )
            middles = [(each["from"] + each["to"]) / 2 for each in row["entropy"]]
            entropy.plot(middles, [each["mean_level"] for each in row["entropy"]], marker="o")
        position.set(title=f"{key[1]}: {heading(key)}", xlabel="position in the answer", ylabel="mean t")
        by_class.tick_params("x", rotation=90, labelsize=7)
        entropy.set(xlabel="entropy of the context, bits", xlim=(0, None), ylim=(-0.02, 1.02))
        for axis in (position, by_class, entropy):
            axis.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
