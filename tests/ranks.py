"""Several processes that are the ranks of one job, for tests of what runs over ranks."""

from __future__ import annotations

import faulthandler
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# How long the other ranks have to say what they saw, once one has failed; most of them wait for it in a collective.
_GRACE = 2.0


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds what every rank said of it, the first to fail first."""


def run_ranks(worker: Callable[..., None], world: int, folder: Path, *args: Any, timeout: float = 300.0) -> None:
    """Run `worker(rank, world, folder, *args)` in `world` new processes that share a gloo process group.

    Args:
        worker: a function of a module's top level; the processes are spawned and import it.
        world: how many ranks.
        folder: where the ranks meet (a store of one call's own) and may leave files.
        args: further arguments; they are pickled.
        timeout: seconds until a rank that has not ended counts as hung, the start (5 s and more) among them.

    Raises:
        RankError: with the traceback of every rank that failed, or where it stood when the time was over.
    """
    meeting = Path(tempfile.mkdtemp(prefix="ranks-", dir=folder))
    context = mp.get_context("spawn")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when a process imports torch
    deadline = time.time() + timeout
    ranks = [
        context.Process(target=_run, args=(worker, rank, world, folder, meeting, deadline, args))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        while any(process.is_alive() for process in ranks) and time.time() < deadline:
            if any(process.exitcode for process in ranks):
                deadline = min(deadline, time.time() + _GRACE)
            time.sleep(0.02)
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
    said = sorted((file for file in meeting.glob("rank-*") if file.stat().st_size), key=lambda f: f.stat().st_mtime)
    reports = [f"{file.name}:\n{file.read_text(encoding='utf-8')}" for file in said]
    shutil.rmtree(meeting)
    codes = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode}
    if codes:
        state = f"ranks still running at the end: {hung or 'none'}; exit codes {codes} (a negative one is a signal)"
        raise RankError("\n".join([state, *reports]))


def _run(
    worker: Callable[..., None],
    rank: int,
    world: int,
    folder: Path,
    meeting: Path,
    deadline: float,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    left = max(1.0, deadline - time.time())
    with (meeting / f"rank-{rank}").open("w", encoding="utf-8") as report:
        # Where a rank hangs, it says so itself just before it is ended.
        faulthandler.dump_traceback_later(max(0.5, left - 1), file=report)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{meeting / 'store'}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=left),
            )
            worker(rank, world, folder, *args)
            dist.destroy_process_group()
        except BaseException:
            report.write(traceback.format_exc())
            report.flush()
            os._exit(1)  # what is left of the group would wait for the others
        finally:
            faulthandler.cancel_dump_traceback_later()
