"""Where t goes: which tokens of the test set a trained model sketches at which level.

    python -m benchmarks.ablation.where --tasks star-2x5 shakespeare --variants learned --budget 2M

By position, by class of token, and against the entropy of what the context says of the token. Is t high exactly at the fork?

S sequences, N tokens, P prompt tokens, A = N − P tokens scored, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ablation.corpora import CORPORA
from benchmarks.ablation.data import Data
from benchmarks.ablation.options import parser
from benchmarks.ablation.scoring import CHUNK
from benchmarks.ablation.subjects import Subject, subjects
from benchmarks.ablation.tasks import TASKS
from benchmarks.ablation.where_report import write_report
from evo import Evo
from evo.core.bound import Sketch, learned_levels
from evo.core.chance import Chance
from evo.core.contract import as_batch
from evo.training.seeds import Purpose, generator

TABLE = "where"
DEFAULT = ("star-2x5", "sudoku-4", "addition-6", "parity-12", "total-first-12", "chain-5")
BINS = 10


class Chosen(NamedTuple):
    """Of the scored tokens of the test set, (S, A) each, in float64 on the CPU.

    Attributes:
        levels: that the head chooses, position by position, behind the true tokens noised at the levels chosen for them.
        entropy: of the context distribution that the head sees there, in bits.
        clean: entropy of the context distribution behind the true tokens as they are, in bits.
    """

    levels: Tensor
    entropy: Tensor
    clean: Tensor


@torch.no_grad()
def chosen(model: Evo, data: Data, seed: int) -> Chosen:
    """What the head of a model chooses."""
    device = model.bos.device
    source = generator(device, seed, Purpose.EVALUATION, 3)
    parts = []
    for tokens in data.test.to(device).split(CHUNK):
        batch = as_batch(model, tokens, data.prompt_length)
        noise = Chance(source, len(tokens)).normal(tokens.shape[1], model.latent_space.dim, like=model.bos)
        levels = learned_levels(model, batch, noise)
        seen = Sketch(model, batch, levels, noise).context_log_probs
        clean = model.context_logits(tokens).log_softmax(-1)
        found = torch.stack([levels, _entropy(seen), _entropy(clean)])
        parts.append(found[..., data.prompt_length :].double().cpu())
    return Chosen(*torch.cat(parts, 1))


def _entropy(log_probs: Tensor) -> Tensor:
    """In bits, of log-probabilities (..., V) in nats."""
    return torch.special.entr(log_probs.exp()).sum(-1) / math.log(2)


def classes(data: Data) -> list[list[str]]:
    """What each scored token of the test set is, S lists of A names: of a puzzle by its place, of text by what is written."""
    if data.task is not None:
        return [list(data.task.classes())] * len(data.test)
    assert data.spelling is not None
    return [kinds_of([data.spelling[token] for token in row]) for row in data.test.tolist()]


def kinds_of(texts: list[bytes]) -> list[str]:
    """Of tokens of a text. Bytes beyond ASCII, which are parts of letters mostly, count as letters; what precedes the first is unknown."""
    kinds, previous = [], b""
    for text in texts:
        body = text.lstrip() or text[-1:]
        before = text[: len(text) - len(body)][-1:] or previous
        if not before:
            kind = "first token"
        elif body.isspace():
            kind = "space"
        elif body[:1].isdigit():
            kind = "digit"
        elif not _is_letter(body):
            kind = "punctuation"
        else:
            kind = "letter" if _is_letter(before) else "word start"
        kinds.append(kind)
        previous = text[-1:]
    return kinds


def _is_letter(text: bytes) -> bool:
    return text[:1].isalpha() or text[0] > 127


def rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Spearman's, ties sharing their mean rank; None where either is constant."""
    ranks = torch.stack([_ranks(values.flatten()) for values in (first, second)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    lengths = ranks.norm(dim=1)
    return None if not lengths.all() else (ranks.prod(0).sum() / lengths.prod()).item()


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place].double()


def figures(found: Chosen, kinds: list[list[str]], vocab_size: int) -> dict[str, Any]:
    """Means of t by position, class and entropy, as JSON values.

    `highest` is the share of sequences whose highest level is there; positions that share it have equal parts.
    """
    levels, entropy = found.levels, found.entropy
    top = (levels == levels.amax(1, keepdim=True)).double()
    top = top / top.sum(1, keepdim=True)

    def means(chosen_tokens: Tensor) -> dict[str, float]:
        return {
            "share": chosen_tokens.double().mean().item(),
            "mean_level": levels[chosen_tokens].mean().item(),
            "highest": (top * chosen_tokens).sum().item() / len(levels),
            "entropy": entropy[chosen_tokens].mean().item(),
        }

    names = list(dict.fromkeys(kind for row in kinds for kind in row))
    index = {name: number for number, name in enumerate(names)}
    kind = torch.tensor([[index[name] for name in row] for row in kinds])
    position = torch.arange(levels.shape[1]).expand(levels.shape)
    width = math.log2(vocab_size) / BINS
    part = (entropy / width).long().clamp(max=BINS - 1)
    return {
        "mean_level": levels.mean().item(),
        "realised": (levels == 0).double().mean().item(),
        "rank_correlation": {
            "entropy": rank_correlation(levels, entropy),
            "clean_entropy": rank_correlation(levels, found.clean),
        },
        "positions": [means(position == place) for place in range(levels.shape[1])],
        "classes": {name: means(kind == number) for name, number in index.items()},
        "entropy": [
            {"from": width * number, "to": width * (number + 1), **means(part == number)}
            for number in range(BINS)
            if (part == number).any()
        ],
    }


def examine(subject: Subject) -> dict[str, Any]:
    """Where t goes in one trained row."""
    data = subject.data
    return figures(chosen(subject.model(), data, subject.row.seed), classes(data), data.vocab_size)


def main() -> None:
    options = parser(__doc__ or "", {**TASKS, **CORPORA}, DEFAULT, budget=2_000_000)
    options.set_defaults(variants=["learned"])
    given = options.parse_args()
    for subject in subjects(given):
        subject.examined(TABLE, {"bins": BINS}, examine)
    print(write_report(given.results, TABLE))


if __name__ == "__main__":
    main()
