"""What each schedule does to the readable information: the figure and the table of docs/schedules.md.

python benchmarks/schedules_figure.py [--out docs/figures/schedules.png]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib as mpl
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt

from evo.schedules import (
    Cosine,
    InformationUniform,
    LinearVP,
    RectifiedFlow,
    Schedule,
    Shifted,
    Sigmoid,
    VarianceExploding,
    readable_information,
)

VOCAB_SIZE = 8192
RADIUS = math.sqrt(2 * math.log(VOCAB_SIZE))
WIDE = 32.0  # unit variance in 1 024 dimensions

SCHEDULES: dict[str, Schedule] = {
    "Cosine": Cosine(),
    "LinearVP": LinearVP(),
    "Sigmoid": Sigmoid(),
    "RectifiedFlow": RectifiedFlow(),
    "VarianceExploding": VarianceExploding(),
    "InformationUniform": InformationUniform(RADIUS, VOCAB_SIZE),
}
RADII: dict[str, tuple[Schedule, float]] = {
    f"Cosine, r = {RADIUS:.1f}": (Cosine(), RADIUS),
    f"Cosine, r = {WIDE:.0f}": (Cosine(), WIDE),
    f"Shifted to r = {WIDE:.0f}": (Shifted(Cosine(), -2 * math.log(WIDE / RADIUS)), WIDE),
}


def share(schedule: Schedule, t: torch.Tensor, radius: float = RADIUS) -> torch.Tensor:
    return readable_information(schedule.log_snr(t), radius=radius, vocab_size=VOCAB_SIZE)


def print_table() -> None:
    t = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
    print("| schedule | " + " | ".join(f"t={x:.1f}" for x in t.tolist()) + " | t_min | log-SNR at t_min |")
    print("|---" * (len(t) + 3) + "|")
    for name, schedule in SCHEDULES.items():
        cells = [f"{x:.2f}" for x in share(schedule, t).tolist()]
        start = schedule.log_snr(torch.tensor(schedule.t_min, dtype=torch.float64)).item()
        print(f"| `{name}` | " + " | ".join(cells) + f" | {schedule.t_min:.3g} | {start:.1f} |")


def draw(out: Path) -> None:
    t = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)
    figure, (information, ratio, radii) = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for name, schedule in SCHEDULES.items():
        information.plot(t, share(schedule, t), label=name)
        ratio.plot(t, schedule.log_snr(t), label=name)
    for name, (schedule, radius) in RADII.items():
        radii.plot(t, share(schedule, t, radius), label=name, linestyle="--" if "Shifted" in name else "-")
    information.set(title=f"readable information, V = {VOCAB_SIZE}, r = {RADIUS:.2f}", ylabel="share of ln V nats")
    ratio.set(title="log signal-to-noise ratio", ylabel="log SNR", ylim=(-10, 10))
    radii.set(title="the radius decides, a shift undoes it", ylabel="share of ln V nats")
    for axis in (information, ratio, radii):
        axis.set(xlabel="level t", xlim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "docs" / "figures" / "schedules.png"
    parser.add_argument("--out", type=Path, default=default, help="where the figure goes")
    arguments = parser.parse_args()
    print_table()
    draw(arguments.out)


if __name__ == "__main__":
    main()
