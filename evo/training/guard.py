"""What a run watches for: samples that spoil a step, being told to end, another run in its folder, and ranks that wait in vain."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakValueDictionary, finalize

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

PREEMPTED = 75
"""Exit status of a run that was told to end, has saved, and can be gone on with (EX_TEMPFAIL)."""
HUNG = 70
"""Exit status of a rank that has waited too long for the others (EX_SOFTWARE)."""


class Preempted(SystemExit):
    """The run was told to end (SIGTERM), and has saved: an exit with status 75 where nobody catches it."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(PREEMPTED)
        self.step, self.steps = step, steps

    def __str__(self) -> str:
        return (
            f"told to end after step {self.step} of {self.steps}; it is saved, and the same command goes on from there"
        )


class Termination:
    """Whether this process has been told to end; a context manager that listens for SIGTERM where a process can, in its main thread."""

    def __init__(self) -> None:
        self.asked = False
        self._before: signal._HANDLER = None

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class FolderLock:
    """A folder that no other process trains in: a lock on a file in it, until nobody here keeps this object, or the process ends.

    On a file system without locks nobody is kept out.

    Args:
        file: to be locked; made where it is not there. It says who has it.

    Raises:
        BlockingIOError: where another process has it.
    """

    def __init__(self, file: Path) -> None:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another run is going on in {file.parent} ({file.read_text()}): let it come to its end, or end it, to go on with it, "
                "or give another --out to start anew"
            ) from error
        except OSError:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} of {socket.gethostname()}".encode())

    @classmethod
    def of(cls, folder: Path) -> FolderLock:
        """That of `folder`, which is made where it is not there; who asks again in this process shares it."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder.resolve() / ".lock"
        if (held := _LOCKS.get(file)) is None:
            held = _LOCKS[file] = cls(file)
        return held


_LOCKS: WeakValueDictionary[Path, FolderLock] = WeakValueDictionary()


class Delayed:
    """A number on the device that the host learns one step late, so that it waits for no step that is under way."""

    def __init__(self) -> None:
        self._waiting: tuple[Tensor, torch.Event | None] | None = None

    def exchange(self, value: Tensor) -> float:
        """Hand in a 0-dim tensor, and get what was handed in before; at first 0."""
        earlier = self._waiting
        event = None
        host = value.to("cpu", non_blocking=True)
        if value.device.type != "cpu":
            event = torch.Event(device=value.device)
            event.record()
        self._waiting = host, event
        if earlier is None:
            return 0.0
        host, event = earlier
        if event is not None:
            event.synchronize()
        return host.item()


class Suspects:
    """The sequences whose own bound was not finite in the latest step that was left out; kept on the device until somebody asks.

    Args:
        total: sequences of a step.
        device: of the model.
    """

    def __init__(self, total: int, device: torch.device) -> None:
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._unsound = torch.zeros(total, dtype=torch.bool, device=device)

    def note(self, step: int, finite: Tensor, unsound: Tensor) -> None:
        """After each step: whether it counted, 0-dim bool, and which sequences were unsound, bool (total,)."""
        self._step = torch.where(finite, self._step, step)
        self._unsound = torch.where(finite, self._unsound, unsound)

    def read(self) -> tuple[int, list[int]]:
        """The step, -1 if none was left out, and the rows of its batch."""
        return int(self._step), self._unsound.nonzero().flatten().tolist()


class Watch:
    """Ends a rank that has been at one place for too long, and says what every rank was doing.

    Ranks tell each other through the store of the process group, by a thread that no collective holds up; with one process there is
    nobody to wait for and no thread. A context manager.

    Args:
        timeout: seconds at one place that are too long.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._place, self._since = "start", time.monotonic()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, place: str) -> None:
        """Say what this rank is about to do."""
        self._place, self._since = place, time.monotonic()

    def __enter__(self) -> Watch:
        self.at("start")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # A connection of its own: what the main thread waits for in the store would hold up this one too.
            known: Any = dist.distributed_c10d._get_default_store()
            store = PrefixStore("evo.watch", known.clone())
            self._main = threading.get_ident()
            self._thread = threading.Thread(target=self._work, args=(store,), name="evo-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self, store: Store) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        interval = min(5.0, self.timeout / 10)
        store.set_timeout(timedelta(seconds=max(1.0, interval)))
        while not self._done.wait(interval):
            place, since = self._place, self._since
            waited = time.monotonic() - since
            # Where the rank that holds the store is gone or stands still, how long this one waits tells.
            with contextlib.suppress(RuntimeError):
                store.set(str(rank), json.dumps([place, waited, time.time()]))
            if waited > self.timeout and not self._done.is_set():
                print(self._report(store, rank, world, place, waited), file=sys.stderr, flush=True)
                os._exit(HUNG)

    def _report(self, store: Store, rank: int, world: int, place: str, waited: float) -> str:
        frames = sys._current_frames()
        stack = "".join(traceback.format_stack(frames[self._main])) if self._main in frames else ""
        lines = [_last_sign(store, other) for other in range(world)]
        return (
            f"rank {rank} has been at {place!r} for {waited:.0f} s; the timeout is {self.timeout:g} s, and the job ends. "
            f"Go on from its last checkpoint with the same command. What each rank was doing, as last heard:\n"
            + "\n".join(lines)
            + f"\nrank {rank} stands here:\n{stack}"
        )


def _last_sign(store: Store, rank: int) -> str:
    try:
        place, waited, when = json.loads(store.get(str(rank)))
    except RuntimeError:
        return f"  rank {rank}: no sign of life"
    return f"  rank {rank}: {place!r} for {waited:.0f} s, heard {max(0.0, time.time() - when):.0f} s ago"
