"""Keys and values that have been computed and will not change.

B batch, H key/value heads, S slots, n new tokens, T packed tokens, R sequences, C head dimension.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class Cache:
    """Keys and values of a batch of sequences: in every layer, slot s of a sequence holds the token that was read s-th.

    It stands at position s, unless `shift` said otherwise when it was read: keys are stored as they are at their position. Sequences may
    have different lengths: what lies in a slot behind the end of a sequence is nobody's. Storage, (B, S, H, C) a layer, is allocated
    once at `capacity` and doubled when that is not enough. What is stored carries no gradient.

    Args:
        capacity: slots to allocate at first.
        limit: slots that will never be exceeded; None is no limit.

    Attributes:
        length: tokens stored of the longest sequence.
        shift: (B,) int64, how much further right than its slot stands what is read from now on; None is not at all.
    """

    def __init__(self, capacity: int, limit: int | None = None) -> None:
        if capacity < 1 or (limit is not None and limit < capacity):
            raise ValueError(
                f"capacity is {capacity}, limit {limit}; a cache needs at least one slot, and a limit no lower than its capacity"
            )
        self.capacity, self.limit = capacity, limit
        self.length = 0
        self.shift: Tensor | None = None
        # How many tokens each sequence is shorter than the longest, on the device and on the host; None where all are alike.
        self._behind: Tensor | None = None
        self._behind_host: tuple[int, ...] | None = None
        self._layers: list[tuple[Tensor, Tensor]] = []

    @property
    def lengths(self) -> int | Tensor:
        """Tokens stored of each sequence: int where all agree, else (B,). `length` is that of the longest."""
        return self.length if self._behind is None else self.length - self._behind

    def next_slots(self, count: int) -> int | Tensor:
        """The slots of the next `count` tokens: the first of them, int, where all sequences agree, else (B, count)."""
        if self._behind is None:
            return self.length
        return (self.length - self._behind)[:, None] + torch.arange(count, device=self._behind.device)

    def positions(self, slots: Tensor, sequence: Tensor | None = None) -> Tensor:
        """Where tokens in these slots stand: (B or 1, n), or (1, T) of the sequences (T,) -> the same, or (B, n)."""
        if self.shift is None:
            return slots
        return slots + (self.shift[:, None] if sequence is None else self.shift[sequence])

    def ends(self, count: int) -> tuple[int, ...] | None:
        """The length each sequence will have with `count` more tokens, on the host; None where all agree."""
        if self._behind_host is None:
            return None
        return tuple(self.length + count - behind for behind in self._behind_host)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values up to the end of the longest sequence, each (B, H, length, C): views, not copies."""
        keys, values = self._layers[layer]
        return keys[:, : self.length].transpose(1, 2), values[:, : self.length].transpose(1, 2)

    def write(self, layer: int, keys: Tensor, values: Tensor, at: int | Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Put keys and values (B, H, n, C) in their slots, and return those of the first `slots` slots, each (B, H, slots, C).

        They are overwritten by what comes next, unless `advance` counts them as stored after the last layer.

        Args:
            at: the first slot, or a slot for each, (B, n), as `next_slots` says.
            slots: how many there are with the new ones.

        Raises:
            ValueError: for more slots than the limit, or for another batch or dtype than what is stored.
        """
        self._check(layer, keys)
        stored_keys, stored_values = self._storage(layer, slots, keys, values)
        _put(stored_keys, keys.detach().transpose(1, 2), at)
        _put(stored_values, values.detach().transpose(1, 2), at)
        return stored_keys[:, :slots].transpose(1, 2), stored_values[:, :slots].transpose(1, 2)

    def scatter(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        sequence: Tensor,
        at: Tensor,
        slots: int,
        batch: int,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `write`, for T tokens of any sequences: keys and values (H, T, C).

        Args:
            sequence, at: (T,) int64, whose each token is, and its slot.
            slots: how many there are with the new ones.
            batch: B, for a cache that nothing has been written to yet.
            rows: (R,) int64, the sequences to return keys and values of, as copies; None is all, as views.

        Returns:
            Keys and values of the first `slots` slots, each (B or R, H, slots, C).
        """
        shape = (batch, keys.shape[0], 0, keys.shape[2])
        like = keys.new_empty(shape), values.new_empty(shape)
        self._check(layer, like[0])
        found = []
        for stored, new in zip(self._storage(layer, slots, *like), (keys, values), strict=True):
            stored[sequence, at] = new.detach().transpose(0, 1)
            seen = stored[:, :slots]
            found.append((seen if rows is None else seen.index_select(0, rows)).transpose(1, 2))
        return found[0], found[1]

    def join(self, layer: int, keys: Tensor, values: Tensor, at: int | Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """What `write` returns, as a copy that carries the gradient of the new keys and values; the cache stays as it is."""
        if not self._layers:
            return keys, values
        self._check(layer, keys)
        past_keys, past_values = self.read(layer)
        return _joined(past_keys, keys, at, slots), _joined(past_values, values, at, slots)

    def advance(self, count: int) -> None:
        """Count the `count` tokens that every layer has just written as stored."""
        self.length += count

    def rewind(self, count: int | Tensor) -> None:
        """Forget the last `count` tokens of every sequence, or the last count[b] of each: int64 (B,).

        The host must know lengths, to allocate and to choose kernels: a tensor is waited for, once.

        Raises:
            ValueError: if a sequence has fewer, or for counts of another batch.
        """
        if isinstance(count, int):
            shortest = self.length - max(self._behind_host or (0,))
            if not 0 <= count <= shortest:
                raise ValueError(f"cannot take back {count} tokens of a cache whose shortest sequence has {shortest}")
            self.length -= count
            return
        if count.dim() != 1 or (self._layers and len(count) != len(self._layers[0][0])):
            batch = len(self._layers[0][0]) if self._layers else "B"
            raise ValueError(
                f"counts have shape {tuple(count.shape)}; this cache needs ({batch},), or one int for all sequences"
            )
        taken = count.tolist()
        behind = self._behind_host or (0,) * len(taken)
        lengths = [self.length - late - less for late, less in zip(behind, taken, strict=True)]
        if min(taken) < 0 or min(lengths) < 0:
            raise ValueError(
                f"cannot take back {taken} tokens of a cache whose sequences have {[self.length - late for late in behind]}"
            )
        self._settle(lengths, self._layers[0][0].device if self._layers else count.device)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order (a sequence may be kept twice): int64 (R,), R at least 1."""
        for layer, pair in enumerate(self._layers):
            keys, values = (_rows(x, rows, self.length, self.capacity) for x in pair)
            self._layers[layer] = keys, values
        if self._behind_host is not None:
            lengths = [self.length - self._behind_host[row] for row in rows.tolist()]
            self._settle(lengths, rows.device)
        if self.shift is not None:
            self.shift = self.shift[rows]

    def take(self, rows: Tensor) -> Cache:
        """A cache of these sequences, as `select` would leave it, with storage of its own; this one stays as it is."""
        taken = copy.copy(self)
        taken._layers = list(self._layers)
        taken.select(rows)
        return taken

    def _settle(self, lengths: list[int], device: torch.device) -> None:
        self.length = max(lengths)
        behind = tuple(self.length - length for length in lengths)
        if any(behind):
            self._behind, self._behind_host = torch.tensor(behind, device=device), behind
        else:
            self._behind = self._behind_host = None

    def _check(self, layer: int, new: Tensor) -> None:
        if layer == len(self._layers):
            return
        stored = self._layers[layer][0]
        if len(new) != len(stored) or new.dtype != stored.dtype:
            raise ValueError(
                f"keys and values of {len(new)} sequences in {new.dtype} do not fit a cache of {len(stored)} in {stored.dtype}: "
                "a batch needs a cache of its own, filled and read in one precision (autocast on for both, or for neither)"
            )

    def _storage(self, layer: int, slots: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if slots > self.capacity:
            if self.limit is not None and slots > self.limit:
                raise ValueError(f"{slots} slots are needed, and this cache is limited to {self.limit}")
            grown = max(slots, 2 * self.capacity)
            self.capacity = grown if self.limit is None else min(grown, self.limit)
        if layer == len(self._layers):
            self._layers.append((_empty(keys, self.capacity), _empty(values, self.capacity)))
        elif self._layers[layer][0].shape[1] < slots:
            grown_keys, grown_values = (_grown(x, self.length, self.capacity) for x in self._layers[layer])
            self._layers[layer] = grown_keys, grown_values
        return self._layers[layer]


def _empty(like: Tensor, slots: int) -> Tensor:
    """Storage (B, S, H, C) for (B, H, n, C). Zeros, because what no sequence owns is weighted with zero, and 0·NaN is NaN."""
    batch, heads, _, dim = like.shape
    return like.new_zeros(batch, slots, heads, dim)


def _grown(old: Tensor, length: int, slots: int) -> Tensor:
    new = old.new_zeros(old.shape[0], slots, *old.shape[2:])
    new[:, :length] = old[:, :length]
    return new


def _rows(old: Tensor, rows: Tensor, length: int, slots: int) -> Tensor:
    new = old.new_zeros(len(rows), slots, *old.shape[2:])
    new[:, :length] = old[rows, :length]
    return new


def _put(storage: Tensor, new: Tensor, at: int | Tensor) -> None:
    if isinstance(at, Tensor):
        storage.scatter_(1, at[:, :, None, None].expand_as(new), new)
    else:
        storage[:, at : at + new.shape[1]] = new


def _joined(past: Tensor, new: Tensor, at: int | Tensor, slots: int) -> Tensor:
    if isinstance(at, int):
        return torch.cat([past[:, :, :at], new], 2)
    room = torch.cat([past, past.new_zeros(*past.shape[:2], slots - past.shape[2], past.shape[3])], 2)
    return room.scatter(2, at[:, None, :, None].expand_as(new), new)
