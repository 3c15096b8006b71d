"""Keys and values that have been computed and will not change.

B batch, H key/value heads, S slots, C head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """One growing pair of tensors (B, H, S, C) a layer.

    Slots are filled from the left by `store`; `positions` says where in its sequence each slot stands, for batches whose
    sequences begin in different slots (padding on the left has negative positions). Storage is allocated once at `capacity`
    and doubled when that is not enough. What is stored carries no gradient.

    Args:
        capacity: slots to allocate at first.
        positions: (B, n) positions of the slots stored first, or None where every sequence begins in slot 0. Later slots
            continue from the last of them.
    """

    def __init__(self, capacity: int, positions: Tensor | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a cache needs at least one slot")
        self.capacity, self.length = capacity, 0
        self._first = None if positions is None else positions[:, :1]
        self._layers: list[tuple[Tensor, Tensor]] = []

    def positions(self, start: int, stop: int) -> Tensor | range:
        """Positions of slots start..stop-1: a range where all sequences agree, else (B, stop - start)."""
        if self._first is None:
            return range(start, stop)
        return self._first + torch.arange(start, stop, device=self._first.device)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values stored so far, each (B, H, length, C): views, not copies."""
        keys, values = self._layers[layer]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (B, H, n, C) behind the stored ones and return all of them.

        They count as stored once `advance` has been called, after the last layer.
        """
        stop = self.length + keys.shape[2]
        self._reserve(layer, stop, keys)
        stored_keys, stored_values = self._layers[layer]
        stored_keys[:, :, self.length : stop] = keys.detach()
        stored_values[:, :, self.length : stop] = values.detach()
        return stored_keys[:, :, :stop], stored_values[:, :, :stop]

    def advance(self, count: int) -> None:
        """Count the slots that every layer has just written as stored."""
        self.length += count

    def crop(self, length: int) -> None:
        """Forget all but the first `length` slots."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} slots to {length}")
        self.length = length

    def _reserve(self, layer: int, slots: int, like: Tensor) -> None:
        while self.capacity < slots:
            self.capacity *= 2
        if layer == len(self._layers):
            shape = (*like.shape[:2], self.capacity, like.shape[3])
            self._layers.append((like.new_empty(shape), like.new_empty(shape)))
        elif self._layers[layer][0].shape[2] < slots:
            grown = []
            for old in self._layers[layer]:
                new = old.new_empty((*old.shape[:2], self.capacity, old.shape[3]))
                new[:, :, : self.length] = old[:, :, : self.length]
                grown.append(new)
            self._layers[layer] = (grown[0], grown[1])
