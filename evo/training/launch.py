"""The process group of a job: by `torchrun`, by whoever calls, or none for one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from evo.training.guard import Preempted
from evo.training.precision import pick_device


@contextmanager
def launched(device: str, timeout: float) -> Iterator[torch.device]:
    """The device of this process, as one of the ranks that the environment speaks of.

    Under `torchrun` (RANK, WORLD_SIZE and the others are set) it joins their process group, NCCL on a GPU and gloo on the CPU, and leaves
    it at the end. A process group that is there already is used and left alone. Otherwise there is one process, and none is made.

    Args:
        device: as in `pick_device`; an accelerator without a number is that of LOCAL_RANK.
        timeout: seconds after which ranks that wait in vain are ended by `Watch`, which can say why; collectives give up later.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    chosen = pick_device(device)
    if chosen.type != "cpu" and (device == "auto" or ":" not in device):
        chosen = torch.device(chosen.type, local)
    if chosen.type != "cpu":
        torch.accelerator.set_device_index(chosen.index)
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield chosen
        return
    dist.init_process_group("gloo" if chosen.type == "cpu" else None, timeout=timedelta(seconds=2 * timeout + 60))
    try:
        yield chosen
    except Preempted:
        dist.destroy_process_group()
        raise
    # After any other error the rest of the job may hang in a collective, and to leave the group in order would be to wait for it.
    dist.destroy_process_group()
