"""Quality against what it costs to write, as a table and a plot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._harness import table
from benchmarks.ablation.report import Result, commands, grouped, heading, kind, named, over_seeds, results
from evo.files import write_text


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What writing costs.

    Args:
        entry: of a result, that says it.
        label: in plots.
        scale: of their axis.
        shown: in tables.
    """

    entry: str
    label: str
    scale: str
    shown: Callable[[float], str]


EVALUATIONS = Cost(entry="nfe", label="network evaluations", scale="symlog", shown=lambda nfe: f"nfe {nfe:.0f}")
OPERATIONS = Cost(
    entry="flops_per_token",
    label="operations a token written",
    scale="log",
    shown=lambda flops: f"{flops / 1e6:.3g} MFLOP a token",
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One solver at one kind of levels, over numbers of steps.

    Attributes:
        kind: of the rows, as by `report.kind`.
        levels: that were written at.
        solver: its name.
        points: for each number of steps what was found, one for each seed.
    """

    kind: tuple[Any, ...]
    levels: str
    solver: str
    points: dict[int, list[dict[str, Any]]]

    @property
    def figures(self) -> list[str]:
        """What quality is measured by."""
        first = next(iter(self.points.values()))[0]
        return [name for name in ("accuracy", "perplexity", "entropy") if name in first]


def write_report(folder: Path, name: str, cost: Cost) -> str:
    """Write `<name>.md` and `<name>.png` beside the results of a table in `folder`; the table."""
    rows = results(folder, name)
    curves = list(_curves(rows))
    text = _rendered(name, curves, rows, cost)
    write_text(folder / f"{name}.md", text)
    _plot(curves, cost, folder / f"{name}.png")
    return text


def _curves(rows: Sequence[Result]) -> Iterator[Curve]:
    for key, group in sorted(grouped(rows, kind).items()):
        found: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for written in (each for row in group for each in row["written"]):
            found[written["levels"], written["solver"]][written["steps"]].append(written)
        for (levels, solver), points in found.items():
            yield Curve(kind=key, levels=levels, solver=solver, points=dict(points))


def _rendered(name: str, curves: Sequence[Curve], rows: Sequence[Result], cost: Cost) -> str:
    steps = sorted({number for curve in curves for number in curve.points})
    lines = []
    for curve in curves:
        seeds = max(len(point) for point in curve.points.values())
        start = [*named(curve.kind), seeds, curve.levels, curve.solver, ", ".join(curve.figures)]
        lines.append([*start, *(_cell(curve, curve.points.get(number, []), cost) for number in steps)])
    head = ["task", "size", "examples", "tokens", "variant", "seeds", "t", "solver", "quality"]
    return "\n".join(
        [f"# {name}", "", table([*head, *(f"K = {number}" for number in steps)], lines), "", *commands(rows)]
    )


def _cell(curve: Curve, point: Sequence[dict[str, Any]], cost: Cost) -> str:
    if not point:
        return "–"
    quality = ", ".join(over_seeds(each[figure] for each in point) for figure in curve.figures)
    return f"{quality} ({cost.shown(_mean(point, cost.entry))})"


def _mean(point: Sequence[dict[str, Any]], entry: str) -> float:
    return math.fsum(each[entry] for each in point) / len(point)


def _plot(curves: Sequence[Curve], cost: Cost, target: Path) -> None:
    """A panel for each task, variant, kind of levels and figure; the mean over seeds of each size and solver as a curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[Curve]] = defaultdict(list)
    for curve in curves:
        levels = "its own" if curve.levels == "own" else f"≡ {curve.levels}"
        title = f"{heading(curve.kind)}\nt {levels}"
        for figure in curve.figures:
            panels[title, figure].append(curve)
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    drawing, axes = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((title, figure), here) in zip(axes.flat, panels.items(), strict=False):
        for curve in here:
            points = [curve.points[number] for number in sorted(curve.points)]
            costs, values = ([_mean(point, entry) for point in points] for entry in (cost.entry, figure))
            axis.plot(costs, values, marker="o", markersize=4, alpha=0.8, label=f"{curve.kind[1]}, {curve.solver}")
        axis.set(xscale=cost.scale, xlabel=cost.label, ylabel="entropy, bits" if figure == "entropy" else figure)
        if figure == "accuracy":
            axis.set_ylim(-0.02, 1.02)
        axis.tick_params("x", which="minor", labelbottom=False)
        axis.set_title(title, fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    drawing.savefig(target, dpi=120)
    pyplot.close(drawing)
