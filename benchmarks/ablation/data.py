"""What a row trains on and is judged by, whether puzzles or text.

S sequences, N tokens, P prompt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ablation.tasks import Task, examples
from evo.training.seeds import Purpose, generator


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """Sequences to train on and sequences to be measured on.

    Attributes:
        vocab_size: V.
        length: N.
        prompt_length: P, the same for all sequences.
        train: (S, N) sequences, or (T,) one long text, of which a batch takes crops.
        test: (S, N).
        spelling: the bytes that each entry of a text's vocabulary stands for; None for puzzles.
        task: the puzzles, None for text.
    """

    vocab_size: int
    length: int
    prompt_length: int
    train: Tensor
    test: Tensor
    spelling: tuple[bytes, ...] | None = None
    task: Task | None = None

    @property
    def test_bytes(self) -> int | None:
        """Bytes that the tokens of `test` stand for; None for puzzles."""
        if self.spelling is None:
            return None
        return int(torch.tensor([len(entry) for entry in self.spelling])[self.test].sum())

    def parted(self, share: float) -> tuple[Data, Data]:
        """The same but for the last `share` of what is trained on, and the same with that alone."""
        count = len(self.train) - max(1, round(share * len(self.train)))
        return replace(self, train=self.train[:count]), replace(self, train=self.train[count:])

    def batch(self, seed: int, step: int, count: int) -> Tensor:
        """Sequences drawn at random, (count, N): a function of its arguments."""
        source = generator("cpu", seed, Purpose.DATA, step)
        if self.train.dim() == 2:
            return self.train[torch.randint(len(self.train), (count,), generator=source)]
        starts = torch.randint(len(self.train) - self.length + 1, (count, 1), generator=source)
        return self.train[starts + torch.arange(self.length)].long()


def puzzles(task: Task, train_size: int, test_size: int, folder: Path | None = None) -> Data:
    """A planning task with so many training and test examples, or as many as there are; kept in `folder`, if one is given."""
    return Data(
        vocab_size=len(task.words),
        length=task.prompt_length + task.answer_length,
        prompt_length=task.prompt_length,
        train=examples(task, "train", train_size, folder),
        test=examples(task, "test", test_size, folder),
        task=task,
    )
