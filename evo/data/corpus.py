"""What a run reads: tokens to train on and tokens held out, and the batch of each step as a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from evo.data.encoding import BYTES, Encoding
from evo.data.order import epoch_key, permuted
from evo.data.packing import CONTIGUOUS, PACKINGS, Packed, Packing, Rows, fill
from evo.data.shards import MANIFEST, TokenShards
from evo.data.sources import CorpusConfig, reads, survey
from evo.data.writing import SHARD_BYTES, write_shards
from evo.files import read_json, write_json

_SOURCE = "source.json"
_LIMIT = 1 << 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens to train on, tokens held out, and how documents are laid into rows.

    Attributes:
        train, held_out: the tokens of either side.
        packing: of the rows to train on; held-out rows are always `Contiguous`, so that every token counts once.
    """

    train: TokenShards
    held_out: TokenShards
    packing: Packing = CONTIGUOUS
    _rows: dict[int, Rows] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        one, other = self.train, self.held_out
        if (one.encoding, one.vocabulary) != (other.encoding, other.vocabulary):
            raise ValueError(
                f"{one.folder} was tokenized by {one.encoding!r} and {other.folder} by {other.encoding!r}: "
                "prepare both with the same tokenizer"
            )

    @classmethod
    def open(cls, folder: Path, packing: Packing = CONTIGUOUS) -> Corpus:
        """A prepared folder: shards in its folders `train` and `held_out`.

        Raises:
            FileNotFoundError, ValueError: where either is not there or not whole.
        """
        return cls(
            train=TokenShards.open(folder / "train"), held_out=TokenShards.open(folder / "held_out"), packing=packing
        )

    @property
    def vocabulary(self) -> int:
        """V, entries that a model of this corpus needs."""
        return self.train.vocabulary

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of both sides."""
        return hashlib.sha256((self.train.fingerprint + self.held_out.fingerprint).encode()).hexdigest()

    def rows(self, length: int) -> int:
        """Rows of `length` tokens that an epoch has."""
        return self._layout(length).count

    def batch(self, seed: int, step: int, rows: Sequence[int], total: int, length: int) -> Packed:
        """Some rows of a step's whole batch: a pure function of its arguments, the same whoever asks and whatever else they ask for.

        Row r of step s is number s·total + r of the run. Each epoch has every row of the corpus once, in an order of its own.

        Args:
            seed: of the order.
            step: from 0.
            rows: which of the `total` rows, in [0, total).
            total: rows of a step's whole batch.
            length: tokens of a row, N.

        Returns:
            Packed of (len(rows), N).

        Raises:
            ValueError: where there are not tokens enough for one row, or for rows that the batch does not have.
        """
        if not len(rows) or not all(0 <= row < total for row in rows):
            raise ValueError(f"rows {list(rows)} of a batch of {total}; needed: at least one, each in [0, {total})")
        return fill(self.train, self._segments(seed, step, rows, total, length), length)

    def describe(self, seed: int, step: int, row: int, total: int, length: int) -> str:
        """Which documents to train on a row of a step's batch is made of, and which tokens of them, for people."""
        found = []
        for start, stop in self._segments(seed, step, [row], total, length)[0]:
            number, begin = self.train.document(start)
            found.append(f"document {number} (tokens {start - begin} to {stop - begin - 1})")
        return f"row {row}, which is {', '.join(found)}"

    def text_bytes(self, tokens: Tensor, *, held_out: bool = False) -> float:
        """Length in UTF-8 of what ids of either side stand for: `TokenShards.text_bytes`."""
        return (self.held_out if held_out else self.train).text_bytes(tokens)

    def held_out_batch(self, count: int, length: int) -> Packed:
        """At most `count` held-out rows, (S, length), that do not overlap, spread evenly over what is held out; always the same ones.

        Raises:
            ValueError: where there are not tokens enough for one row.
        """
        layout = CONTIGUOUS.rows(self.held_out, length)
        places = np.unique(np.linspace(0, layout.count - 1, min(count, layout.count)).round().astype(np.int64))
        return fill(self.held_out, [layout.segments(row, 0) for row in places.tolist()], length)

    def _segments(
        self, seed: int, step: int, rows: Sequence[int], total: int, length: int
    ) -> list[list[tuple[int, int]]]:
        """The stretches of the stream that each of some rows of a step's batch is made of."""
        layout = self._layout(length)
        epochs, places = np.divmod(step * total + np.asarray(rows, np.int64), layout.count)
        segments: list[list[tuple[int, int]]] = [[] for _ in rows]
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            key = epoch_key(seed, epoch)
            for at, row in zip(here.tolist(), permuted(places[here], layout.count, seed, epoch).tolist(), strict=True):
                segments[at] = layout.segments(row, key)
        return segments

    def _layout(self, length: int) -> Rows:
        if length not in self._rows:
            self._rows[length] = self.packing.rows(self.train, length)
        return self._rows[length]


def open_corpus(
    source: Path | None,
    cache: Path,
    config: CorpusConfig,
    *,
    encoding: Encoding = BYTES,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> Corpus:
    """The corpus of `source`: a folder prepared before is read where it is; of texts, a file or a folder, tokens are kept in `cache`.

    What is there is reused while names, sizes and times of the source, the tokenizer and the options are those it was made from. How
    texts are split, see `survey`. A prepared folder keeps the tokenizer, the split and the shards it was prepared with.

    Raises:
        FileNotFoundError: where `source` is not there.
        ValueError: where it is None or holds no text, or was prepared and is not whole; where it would read what a run writes to `cache`.
    """
    if source is None:
        raise ValueError("there is no data: name a file or folder of text, or one that `evo prepare` made")
    packing = PACKINGS[config.packing]
    if prepared(source):
        return Corpus.open(source, packing)
    if reads(source, cache, config):
        raise ValueError(
            f"{cache} lies in {source}, and what is written there would be read as text: give an output folder elsewhere, or say with "
            "corpus.suffixes which files are text"
        )
    found = survey(source, config, encoding.fingerprint)
    known = cache / _SOURCE
    # A cache that is not there, or no longer whole, is made anew.
    with suppress(FileNotFoundError, ValueError):
        if read_json(known, _LIMIT) == {"signature": found.signature}:
            return Corpus.open(cache, packing)
    cache.mkdir(parents=True, exist_ok=True)
    known.unlink(missing_ok=True)
    quiet = not (progress and sys.stderr.isatty())
    with tqdm(total=found.bytes, desc="reading", unit="B", unit_scale=True, leave=False, delay=1, disable=quiet) as bar:
        for name, texts in (("train", found.train), ("held_out", found.held_out)):
            write_shards(
                texts,
                encoding,
                cache / name,
                workers=workers,
                shard_bytes=shard_bytes,
                report=bar.update,
            )
    write_json(known, {"signature": found.signature})
    return Corpus.open(cache, packing)


def prepared(folder: Path) -> bool:
    """Whether a folder holds prepared tokens rather than texts."""
    return (folder / "train" / MANIFEST).is_file()
