"""Speed against quality: which ways nothing else beats, and whether what was aimed at is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.generate.quality import Quality

MARGIN = 0.02
SPEED_UP = 2.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """A way, at one number of new tokens and one batch size.

    Attributes:
        name: of the way.
        speed: tokens a second, in units of autoregression's.
        quality: of what it writes.
    """

    name: str
    speed: float
    quality: Quality


def beats(one: Point, other: Point) -> bool:
    """Whether `one` is in nothing worse, and in something better: faster, likelier or more varied."""
    pairs = (
        (one.speed, other.speed),
        (-one.quality.bits, -other.quality.bits),
        (one.quality.entropy, other.quality.entropy),
    )
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats, fastest first."""
    found = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(found, key=lambda point: -point.speed)


def as_good(quality: Quality, reference: Quality) -> bool:
    """Whether bits are at most `MARGIN` above those of the reference, and entropy at most as much below."""
    return quality.bits <= (1 + MARGIN) * reference.bits and quality.entropy >= (1 - MARGIN) * reference.entropy


def verdict(points: Sequence[Point], reference: Point) -> str:
    """In a sentence, whether something writes `SPEED_UP` times as fast as the reference, and as well."""
    good = [point for point in points if point is not reference and as_good(point.quality, reference.quality)]
    margin = f"quality within {MARGIN:.0%} of {reference.name}'s"
    if not good:
        return f"Not met: nothing else has {margin}."
    best = max(good, key=lambda point: point.speed)
    met = "Met" if best.speed >= SPEED_UP else "Not met"
    return f"{met}: the fastest with {margin} is {best.name}, at {best.speed:.2f} times its speed (aimed at: {SPEED_UP:g})."


def draw(points: Sequence[Point], text: Quality, title: str, file: Path) -> None:
    """A picture: speed across, bits per byte upwards, entropy as colour; the frontier is ringed.

    Raises:
        ImportError: where matplotlib is not there.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'evo-lm[train]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    speeds, bits = [point.speed for point in points], [point.quality.bits for point in points]
    dots = axes.scatter(speeds, bits, c=[point.quality.entropy for point in points], zorder=2)
    best = frontier(points)
    axes.scatter(
        [point.speed for point in best],
        [point.quality.bits for point in best],
        s=120,
        facecolors="none",
        edgecolors="black",
        zorder=3,
        label="beaten by none",
    )
    axes.axhline(text.bits, linestyle="--", color="grey", label=f"held-out text (entropy {text.entropy:.2f})")
    for point in points:
        axes.annotate(
            point.name, (point.speed, point.quality.bits), xytext=(6, 4), textcoords="offset points", fontsize=6
        )
    figure.colorbar(dots, label="entropy of a byte given the one before it, bits")
    axes.set(
        xscale="log", xlabel="tokens a second / autoregression's", ylabel="bits per byte under the judge", title=title
    )
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
