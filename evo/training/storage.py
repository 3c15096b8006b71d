"""Tensors of a job in safetensors files, one a rank: who writes what, and how any other number of ranks reads it again.

Who holds which part of which tensor, that replicas are written once, and which parts of which file a rank must read, is
planned by `torch.distributed.checkpoint`. Its own file layouts keep the plan in a pickle; here it is JSON (`Table`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.tensor import DTensor

from evo.core.shards import DTYPES
from evo.training.peers import Peers

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor: its whole shape, and its chunks, each (number of the file, offsets, shape)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[tuple[int, tuple[int, ...], tuple[int, ...]]]

    def to_json(self) -> list[Any]:
        """The same as JSON values."""
        return [_NAMES[self.dtype], self.shape, self.chunks]

    @classmethod
    def from_json(cls, value: Any) -> Entry:
        """What `to_json` made."""
        dtype, shape, chunks = value
        return cls(
            dtype=DTYPES[dtype],
            shape=tuple(shape),
            chunks=[(file, tuple(offsets), tuple(sizes)) for file, offsets, sizes in chunks],
        )


Table = Mapping[str, Entry]
"""Every tensor of a checkpoint, by name."""


def file_name(rank: int) -> str:
    """Of the file that `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


class Layout:
    """Which rank writes what; planned anew only when some rank's tensors have changed in name, shape, type or placement."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._signature: list[tuple[Any, ...]] | None = None
        self._share: list[MetadataIndex] = []
        self.table: Table = {}  # on the first rank alone

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank writes of `tensors`, plain or `DTensor`: views of local memory, by their names in the file."""
        signature = [_signature(name, tensor) for name, tensor in tensors.items()]
        if not self._peers.agree(lambda: signature == self._signature, all):
            self._plan(tensors)
            self._signature = signature
        state = dict(tensors)
        return {_key(index): find_state_dict_object(state, index).detach() for index in self._share}

    def _plan(self, tensors: Mapping[str, Tensor]) -> None:
        # Whatever is no tensor would be written as a pickle: there is nothing but tensors here.
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

        def local() -> SavePlan:
            planner.set_up_planner(dict(tensors), is_coordinator=self._peers.first)
            return planner.create_local_plan()

        def whole(plans: list[SavePlan]) -> list[list[MetadataIndex]]:
            plans, _ = planner.create_global_plan(plans)
            self.table = _table(plans)
            return [[item.index for item in plan.items] for plan in plans]

        self._share = self._peers.deal(local, whole)


def read(folder: Path, table: Table, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets`, plain or `DTensor`, in place from the files in `folder`; a rank reads no more than it holds.

    Every target must be in the table with its shape.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    wanted = {name: table[name] for name in targets}
    # Loading needs no word from other ranks.
    planner.set_up_planner(dict(targets), Metadata({name: _metadata(entry) for name, entry in wanted.items()}))
    files = {(name, offsets): file for name, entry in wanted.items() for file, offsets, _ in entry.chunks}
    parts: dict[int, list[ReadItem]] = {}
    for item in planner.create_local_plan().items:
        index = item.storage_index
        parts.setdefault(files[index.fqn, tuple(index.offset or ())], []).append(item)
    for file, items in parts.items():
        with safe_open(folder / file_name(file), framework="pt") as opened:
            for item in items:
                key = _key(item.storage_index)
                spans = zip(item.storage_offsets, item.lengths, strict=True)
                region = tuple(slice(start, start + length) for start, length in spans)
                value = opened.get_slice(key)[region] if region else opened.get_tensor(key)
                planner.resolve_tensor(item).detach().copy_(value)


def _signature(name: str, tensor: Tensor) -> tuple[Any, ...]:
    placed = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
    return name, tuple(tensor.shape), tensor.dtype, placed


def _table(plans: Sequence[SavePlan]) -> Table:
    table: dict[str, Entry] = {}
    for file, plan in enumerate(plans):
        for item in plan.items:
            data = item.tensor_data
            assert data is not None, item
            blank = Entry(dtype=data.properties.dtype, shape=tuple(data.size), chunks=[])
            chunk = (file, tuple(data.chunk.offsets), tuple(data.chunk.sizes))
            table.setdefault(item.index.fqn, blank).chunks.append(chunk)
    return table


def _metadata(entry: Entry) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=entry.dtype),
        size=torch.Size(entry.shape),
        chunks=[ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for _, offsets, sizes in entry.chunks],
    )


def _key(index: MetadataIndex) -> str:
    """The name in its file of a tensor or chunk: that of the tensor, with offsets where they are not all 0."""
    offsets = index.offset or ()
    return f"{index.fqn}@{','.join(map(str, offsets))}" if any(offsets) else index.fqn
