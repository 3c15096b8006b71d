"""Token ids on disk: shards in memory maps, read as one long stream of documents.

A folder holds, for each shard, `00000.tokens` (ids, little-endian uint16 or uint32) and `00000.ends` (int64, where each of its documents
ends, in tokens from the beginning of the shard), and `shards.json`, which says what there is and is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from evo.data.encoding import Encoding
from evo.files import read_json, sha256, write_json

MANIFEST = "shards.json"
END = np.dtype("<i8")
_FORMAT = 1
_LIMIT = 256 << 20  # bytes of a manifest: a million shards


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard, as the manifest has it: counts, and the SHA-256 of its two files."""

    tokens: int
    documents: int
    sha256_tokens: str
    sha256_ends: str


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenShards:
    """Documents of token ids, one behind another: a stream of `tokens` ids, kept on disk and mapped where it is read.

    Attributes:
        folder: where it is.
        vocabulary: V.
        dtype: of ids, little-endian uint16 or uint32.
        bos, eos: ids that begin and end a document; no eos is None.
        encoding: fingerprint of the tokenizer.
        bytes: of the texts in UTF-8.
        shards: what the manifest says of each.
    """

    folder: Path
    vocabulary: int
    dtype: np.dtype
    bos: int
    eos: int | None
    encoding: str
    bytes: int
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: Path) -> TokenShards:
        """What is in a folder, after the sizes of all its files have been checked.

        Raises:
            FileNotFoundError: where there is no manifest, or a file of a shard is missing.
            ValueError: for a manifest that cannot be read, and for a file that is not as long as it says.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"no {MANIFEST} in {folder}: it holds no prepared tokens, or their writing was cut off"
            )
        found = cls(folder=folder, **_parsed(path))
        for index, shard in enumerate(found.shards):
            tokens, ends = found.files(index)
            for file, needed in ((tokens, shard.tokens * found.dtype.itemsize), (ends, shard.documents * END.itemsize)):
                if not file.is_file():
                    raise FileNotFoundError(f"{file} is missing: copy the folder whole, or prepare the data again")
                if file.stat().st_size != needed:
                    raise ValueError(
                        f"{file} has {file.stat().st_size} bytes and should have {needed}: it was cut short or altered; "
                        "copy it again, or prepare the data again"
                    )
        return found

    @property
    def tokens(self) -> int:
        """In all shards, those that begin and end documents included."""
        return int(self._starts[-1])

    @property
    def documents(self) -> int:
        """In all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        """Mean length in UTF-8 of a token of text; what begins and ends a document is none."""
        return self.bytes / max(1, self.tokens - self.documents * (1 if self.eos is None else 2))

    def text_bytes(self, tokens: Tensor) -> float:
        """Length in UTF-8 of what ids of any shape stand for: exact where tokens are bytes, else from the mean length of a token."""
        special = tokens == self.bos
        if self.eos is not None:
            special = special | (tokens == self.eos)
        return self.bytes_per_token * int((~special).sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of all files and over how ids are to be read."""
        facts = [
            self.vocabulary,
            self.dtype.str,
            self.encoding,
            *((s.sha256_tokens, s.sha256_ends) for s in self.shards),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def files(self, index: int) -> tuple[Path, Path]:
        """The files of a shard: tokens and ends."""
        return self.folder / f"{index:05d}.tokens", self.folder / f"{index:05d}.ends"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start..stop-1 of the stream, (stop - start,), of `dtype`.

        Raises:
            IndexError: for places outside [0, tokens].
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.tokens}")
        parts = [
            self._maps[index][0][max(start - base, 0) : stop - base] for index, base in self._overlapping(start, stop)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def ends(self, start: int, stop: int) -> np.ndarray:
        """Where documents end within start < end < stop, in tokens from the beginning of the stream, rising, int64."""
        found = [np.empty(0, np.int64)]
        for index, base in self._overlapping(start, stop):
            ends = self._maps[index][1]
            first, last = np.searchsorted(ends, [start - base, stop - base - 1], side="right")
            found.append(ends[first:last].astype(np.int64) + base)
        return np.concatenate(found)

    def document(self, place: int) -> tuple[int, int]:
        """Of the document that holds id `place` of the stream: its number, from 0, and where it begins.

        Raises:
            IndexError: for a place outside [0, tokens).
        """
        if not 0 <= place < self.tokens:
            raise IndexError(f"token {place} of a stream of {self.tokens}")
        index = int(np.searchsorted(self._starts, place, side="right")) - 1
        base, ends = int(self._starts[index]), self._maps[index][1]
        here = int(np.searchsorted(ends, place - base, side="right"))
        before = sum(shard.documents for shard in self.shards[:index])
        return before + here, base + (int(ends[here - 1]) if here else 0)

    def all_ends(self) -> Iterator[np.ndarray]:
        """Where documents end, shard by shard, in tokens from the beginning of the stream, int64."""
        for base, (_, ends) in zip(self._starts, self._maps, strict=False):
            yield ends.astype(np.int64) + base

    def verify(self) -> None:
        """Read every byte and compare checksums, and look whether documents end where they can.

        Raises:
            ValueError: for a file that is not as it was written.
        """
        for index, shard in enumerate(self.shards):
            for file, digest in zip(self.files(index), (shard.sha256_tokens, shard.sha256_ends), strict=True):
                if sha256(file) != digest:
                    raise ValueError(f"{file} is not as it was written: copy it again, or prepare the data again")
            ends = np.concatenate([[0], self._maps[index][1]])
            if (np.diff(ends) < 1).any() or ends[-1] != shard.tokens:
                raise ValueError(f"{self.files(index)[1]} does not rise to {shard.tokens}: prepare the data again")

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)])

    @cached_property
    def _maps(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [
            (np.memmap(tokens, self.dtype, "r"), np.memmap(ends, END, "r"))
            for tokens, ends in (self.files(index) for index in range(len(self.shards)))
        ]

    def _overlapping(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Shards that hold any of start..stop-1, each with the place where it begins."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for index in range(first, len(self.shards)):
            base = int(self._starts[index])
            if base >= stop:
                return
            yield index, base


def write_manifest(folder: Path, encoding: Encoding, size: int, shards: list[Shard]) -> None:
    """Make the shards in a folder a whole: from here on they count."""
    facts = {
        "format": _FORMAT,
        "encoding": encoding.fingerprint,
        "vocabulary": encoding.vocabulary,
        "dtype": encoding.dtype.str,
        "bos": encoding.bos,
        "eos": encoding.eos,
        "bytes": size,
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "shards": [
            {"tokens": s.tokens, "documents": s.documents, "sha256": {"tokens": s.sha256_tokens, "ends": s.sha256_ends}}
            for s in shards
        ],
    }
    write_json(folder / MANIFEST, facts)


def _parsed(path: Path) -> dict[str, Any]:
    facts = read_json(path, _LIMIT)
    try:
        if facts["format"] != _FORMAT:
            raise ValueError(f"{path} has format {facts['format']}, this version of evo reads {_FORMAT}")
        if facts["dtype"] not in ("<u2", "<u4"):
            raise ValueError(f"{path} says that ids are {facts['dtype']!r}; they can be '<u2' or '<u4'")
        shards = tuple(_shard(each) for each in facts["shards"])
        if not shards:
            raise ValueError(f"{path} names no shards: prepare the data again")
        return {
            "vocabulary": _count(facts["vocabulary"]),
            "dtype": np.dtype(facts["dtype"]),
            "bos": _count(facts["bos"], 0),
            "eos": None if facts["eos"] is None else _count(facts["eos"], 0),
            "encoding": str(facts["encoding"]),
            "bytes": _count(facts["bytes"], 0),
            "shards": shards,
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what was written there ({error!r}): copy it again") from error


def _shard(facts: Mapping[str, Any]) -> Shard:
    return Shard(
        tokens=_count(facts["tokens"]),
        documents=_count(facts["documents"]),
        sha256_tokens=str(facts["sha256"]["tokens"]),
        sha256_ends=str(facts["sha256"]["ends"]),
    )


def _count(value: object, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TypeError(f"{value!r} where an integer of at least {least} is needed")
    return value
