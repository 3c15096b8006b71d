"""Batches made ahead of time by a thread, so that a step never waits for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Generic, TypeVar

import torch

from evo.data.packing import Packed
from evo.data.protocol import Data

T = TypeVar("T")


class Prefetch(Generic[T], Iterator[T]):
    """What an iterable yields, in its order, made by a thread that is at most `ahead` items in front.

    An error in the iterable is raised where its item would have come. Close it, or use it as a context manager: the thread then ends with
    the item it is at.

    Args:
        items: iterated by the thread, and by nobody else.
        ahead: items that may wait, at least 1.
    """

    def __init__(self, items: Iterable[T], *, ahead: int = 2) -> None:
        if ahead < 1:
            raise ValueError(f"ahead is {ahead}; at least 1 item must be able to wait")
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), name="evo-prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self.close()
            raise error
        return item  # pyright: ignore[reportReturnType] (None only beside an error, or as an item)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and let go of what it made; a second time, nothing."""
        self._closed.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        """Whether it was put: False once nobody will ask for it."""
        while not self._closed.is_set():
            try:
                # Now and then it looks whether anybody is still there.
                self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


def load(
    corpus: Data,
    seed: int,
    steps: Iterable[int],
    rows: Sequence[int],
    total: int,
    length: int,
    *,
    device: torch.device | str = "cpu",
    ahead: int = 2,
) -> Prefetch[Packed]:
    """`corpus.batch` of these steps, made ahead of time; for a GPU in pinned memory, from which `Packed.to` copies without waiting.

    Args:
        corpus, seed, rows, total, length: as in `Corpus.batch`.
        steps: in the order in which they are wanted.
        device: where batches will go; they are handed out on the CPU.
        ahead: batches that may wait.

    Raises:
        TypeError, ValueError: where its batch would have come, for what is no `Packed` of (len(rows), length).
    """
    pinned = torch.device(device).type == "cuda"

    def make() -> Iterator[Packed]:
        for step in steps:
            batch = checked(corpus.batch(seed, step, rows, total, length), len(rows), length)
            yield batch.pin_memory() if pinned else batch

    return Prefetch(make(), ahead=ahead)


def checked(batch: Packed, most: int, length: int, *, least: int | None = None) -> Packed:
    """A batch that somebody's data gave, if it has from `least` (by default as many) to `most` rows of `length` tokens.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if not isinstance(batch, Packed):
        raise TypeError(f"the data gave a batch of type {type(batch).__name__}; an evo.data.Packed is needed")
    rows, tokens = batch.tokens.shape
    least = most if least is None else least
    if not least <= rows <= most or tokens != length:
        needed = f"{most}" if least == most else f"{least} to {most}"
        raise ValueError(f"the data gave a batch of shape {(rows, tokens)}; needed: {needed} rows of {length} tokens")
    return batch
