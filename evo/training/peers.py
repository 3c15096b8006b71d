"""Ranks that decide together: what fails on one fails on all, so that none is left waiting for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")


class Peers:
    """All ranks of the job over a process group of their own on the CPU; without `torch.distributed`, this process alone.

    To be made by all ranks at once. The group of its own lets a thread talk while training uses the default one.

    Args:
        timeout: how long a rank waits for the others; None is the default of `torch.distributed` (30 minutes).
        alone: leave the other ranks out of it, though there are some.
    """

    def __init__(self, timeout: timedelta | None = None, *, alone: bool = False) -> None:
        self._group: dist.ProcessGroup | None = None
        self.rank, self.count = 0, 1
        if not alone and dist.is_available() and dist.is_initialized():
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
            self.rank, self.count = dist.get_rank(self._group), dist.get_world_size(self._group)

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides."""
        return self.rank == 0

    def agree(self, work: Callable[[], T], decide: Callable[[list[T]], R]) -> R:
        """Do `work` on every rank, let the first `decide` on the results (in order of rank), and return that on every rank.

        Raises on every rank what was raised on any: `OSError` and `ValueError` as themselves, others as `RuntimeError`.
        """
        verdict = [self._verdict(work, decide)]
        if self._group is not None:
            dist.broadcast_object_list(verdict, src=dist.get_global_rank(self._group, 0), group=self._group)
        return _opened(verdict[0])

    def deal(self, work: Callable[[], T], decide: Callable[[list[T]], Sequence[R]]) -> R:
        """As `agree`, but of what the first decides every rank receives its own element alone."""
        verdict = self._verdict(work, decide)
        if self._group is None:
            return _opened(verdict)[0]
        share: list[Any] = [None]
        shares = None
        if verdict is not None:
            values, error = verdict
            shares = [(value, error) for value in values or [None] * self.count]
        dist.scatter_object_list(share, shares, src=dist.get_global_rank(self._group, 0), group=self._group)
        return _opened(share[0])

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns, or raises, on the first rank, which alone does it."""
        return self.agree(lambda: work() if self.first else None, lambda found: found[0])  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _verdict(
        self, work: Callable[[], T], decide: Callable[[list[T]], R]
    ) -> tuple[R | None, Exception | None] | None:
        """On the first rank, what it decided or why it could not; None on the others."""
        mine = _attempt(work)
        found: list[Any] | None = [mine]
        if self._group is not None:
            found = [None] * self.count if self.first else None
            dist.gather_object(mine, found, dst=dist.get_global_rank(self._group, 0), group=self._group)
        if found is None:
            return None
        for _, error in found:
            if error is not None:
                return None, error
        return _attempt(lambda: decide([value for value, _ in found]))


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except (OSError, ValueError) as error:
        return None, error
    except Exception as error:
        # An exception of any other kind may not survive the way to another process.
        told = RuntimeError(f"{type(error).__name__}: {error}")
        told.__cause__ = error
        return None, told


def _opened(verdict: Any) -> Any:
    value, error = verdict
    if error is not None:
        raise error
    return value
