"""Texts to shards of token ids, by one process or several, with the same result.

Texts are dealt to shards by their length as text, before anybody has encoded them: which shard holds what is the same for any number of
workers, and each worker writes shards of its own, under another name until they are whole.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from evo.data.encoding import Encoding
from evo.data.shards import END, MANIFEST, Shard, TokenShards, write_manifest
from evo.files import sync

SHARD_BYTES = 64 << 20
"""Text in a shard, unless told otherwise."""


@dataclass(frozen=True)
class FilePart:
    """Bytes [start, stop) of a file, as one text."""

    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, errors: str) -> str:
        """The text.

        Raises:
            ValueError: where the file has become shorter.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(len(self))
        if len(data) != len(self):
            raise ValueError(
                f"{self.path} had at least {self.stop} bytes a moment ago and is shorter now: leave it alone"
            )
        return data.decode("utf-8", errors)


def write_shards(
    texts: Iterable[str | FilePart],
    encoding: Encoding,
    folder: str | os.PathLike[str],
    *,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[int], object] | None = None,
) -> TokenShards:
    """Encode texts, one document each, into shards in `folder`; what shards it held are replaced. Texts without any id are left out.

    The files are the same for any number of workers. A folder counts as empty from the beginning of the writing to its end, so that what
    a kill leaves is never taken for data.

    Args:
        texts: each a document; may be longer than memory; those of `2 * workers` shards are held at a time.
        encoding: see `Encoding`; with several workers it is pickled.
        folder: made if it is not there.
        workers: processes; 1 is this one.
        shard_bytes: a shard is full when its texts have so many characters (of files: bytes).
        report: called with the bytes in UTF-8 of each shard that is done.

    Raises:
        TypeError: for one text in place of several.
        ValueError: for no text at all, or fewer than one worker or one byte a shard; and what reading and encoding raise.
    """
    if isinstance(texts, (str, bytes, FilePart)):
        raise TypeError(f"texts is one {type(texts).__name__}; give a list of texts, of which each becomes a document")
    folder = Path(folder)
    if workers < 1 or shard_bytes < 1:
        raise ValueError(f"workers is {workers} and shard_bytes {shard_bytes}; both must be at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    sync(folder)
    written: list[_Written] = []
    for done in _write_all(texts, encoding, folder, workers, shard_bytes):
        if report is not None:
            report(done.bytes)
        # A shard whose texts had no ids was not written, and the next one has its number.
        if done.shard is not None:
            for kind in ("tokens", "ends"):
                os.replace(folder / f"{done.index:05d}.{kind}.tmp", folder / f"{len(written):05d}.{kind}")
            written.append(done)
    kept = {name for index in range(len(written)) for name in (f"{index:05d}.tokens", f"{index:05d}.ends")}
    for path in chain(folder.glob("[0-9]*.tokens*"), folder.glob("[0-9]*.ends*")):
        if path.name not in kept:
            path.unlink()
    if not written:
        raise ValueError(f"there is no text to write to {folder}: give at least one that the tokenizer makes tokens of")
    sync(folder)
    write_manifest(
        folder,
        encoding,
        sum(each.bytes for each in written),
        [each.shard for each in written if each.shard is not None],
    )
    return TokenShards.open(folder)


@dataclass(frozen=True, kw_only=True)
class _Written:
    index: int
    bytes: int
    shard: Shard | None


def _write_all(
    texts: Iterable[str | FilePart], encoding: Encoding, folder: Path, workers: int, shard_bytes: int
) -> Iterator[_Written]:
    """Shards in order, as they are done."""
    dealt = enumerate(_dealt(texts, shard_bytes))
    if workers == 1:
        for index, part in dealt:
            yield _write_one(index, part, encoding, folder)
        return
    # Spawned, not forked: a fork of a process with threads, as those of torch are, may stop for ever.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        waiting: deque[Future[_Written]] = deque()
        for index, part in dealt:
            waiting.append(pool.submit(_write_one, index, part, encoding, folder))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _dealt(texts: Iterable[str | FilePart], shard_bytes: int) -> Iterator[list[str | FilePart]]:
    part: list[str | FilePart] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= shard_bytes:
            yield part
            part, size = [], 0
    if part:
        yield part


def _write_one(index: int, texts: list[str | FilePart], encoding: Encoding, folder: Path) -> _Written:
    size, ends, total = 0, [], 0
    target = folder / f"{index:05d}.tokens.tmp"
    digest = hashlib.sha256()
    with target.open("wb") as sink:
        for text in texts:
            document = encoding.document(text.read(encoding.errors) if isinstance(text, FilePart) else text)
            size += len(text) if isinstance(text, FilePart) else len(text.encode("utf-8", "surrogateescape"))
            if not len(document):
                continue
            data = document.tobytes()
            digest.update(data)
            sink.write(data)
            total += len(document)
            ends.append(total)
        sink.flush()
        os.fsync(sink.fileno())
    if not ends:
        target.unlink()
        return _Written(index=index, bytes=size, shard=None)
    data = np.array(ends, END).tobytes()
    with (folder / f"{index:05d}.ends.tmp").open("wb") as sink:
        sink.write(data)
        sink.flush()
        os.fsync(sink.fileno())
    shard = Shard(
        tokens=total,
        documents=len(ends),
        sha256_tokens=digest.hexdigest(),
        sha256_ends=hashlib.sha256(data).hexdigest(),
    )
    return _Written(index=index, bytes=size, shard=shard)
