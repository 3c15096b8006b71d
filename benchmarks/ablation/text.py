"""Text: bits per byte of every variant, and how likely another model finds what each writes, beside how varied it is.

    python -m benchmarks.ablation.text --tasks shakespeare --variants learned t0 t1 --budget 5M

A perplexity of samples alone rewards dullness: one word repeated is very likely. So their entropy stands beside it.
"""

from __future__ import annotations

from benchmarks.ablation.corpora import CORPORA
from benchmarks.ablation.options import parser
from benchmarks.ablation.report import write_report
from benchmarks.ablation.subjects import subjects

TABLE = "text"


def main() -> None:
    given = parser(__doc__ or "", CORPORA, tuple(CORPORA), budget=2_000_000).parse_args()
    for subject in subjects(given):
        result = subject.result()
        bound, samples = result["bound"], result["samples"]
        print(
            f"{subject.row.name}: {bound['own']['bits']:.3f} ± {bound['own']['standard_error']:.3f} bits a byte "
            f"(at 0: {bound['0']['bits']:.3f}, at 1: {bound['1']['bits']:.3f}), mean t {bound['own']['mean_level']:.2f}; "
            f"samples: perplexity {samples['own']['perplexity']:.1f}, "
            f"entropy {samples['own']['entropy']:.2f} bits, {result['seconds']:.0f} s",
            flush=True,
        )
    print(write_report(given.results, TABLE))


if __name__ == "__main__":
    main()
