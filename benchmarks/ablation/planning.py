"""Tasks that need a plan: exact-match accuracy and bound of every variant, against the size of the training set.

python -m benchmarks.ablation.planning --tasks star-2x5 sudoku-4 --variants learned t0 t0.5 t1 --budget 2M
"""

from __future__ import annotations

from benchmarks.ablation.options import parser
from benchmarks.ablation.report import write_report
from benchmarks.ablation.subjects import subjects
from benchmarks.ablation.tasks import TASKS

TABLE = "planning"
DEFAULT = ("star-2x5", "sudoku-4", "addition-6", "parity-12", "total-first-12", "chain-5", "countdown-3")


def main() -> None:
    given = parser(__doc__ or "", TASKS, DEFAULT, budget=2_000_000).parse_args()
    for subject in subjects(given):
        result = subject.result()
        own, accuracy = result["bound"]["own"], result["accuracy"]
        print(
            f"{subject.row.name}: accuracy {accuracy['own']['accuracy']:.3f} (at 0: {accuracy['0']['accuracy']:.3f}, "
            f"at 1: {accuracy['1']['accuracy']:.3f}), bound {own['bits']:.3f} ± {own['standard_error']:.3f} bits a token "
            f"(at 0: {result['bound']['0']['bits']:.3f}, at 1: {result['bound']['1']['bits']:.3f}), "
            f"mean t {own['mean_level']:.2f}, {result['seconds']:.0f} s",
            flush=True,
        )
    print(write_report(given.results, TABLE))


if __name__ == "__main__":
    main()
