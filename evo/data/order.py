"""The order in which rows are read: a permutation for each epoch that is computed, place by place, and never stored."""

from __future__ import annotations

import math

import numpy as np

# Half of them mix enough for a large corpus; over a handful of rows the halves are so small that mixing is slower.
_ROUNDS = 16


def permuted(places: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Which row stands at each of these places of an epoch: a bijection of [0, size) for every (seed, epoch).

    A Feistel network over a rectangle a × b of at least `size` cells, whose halves are added to in turn (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002), walked on from cells that are no row. Constant memory, and some ten operations a place and round.

    Args:
        places: int64 in [0, size), of any shape.
        size: at least 1, below 2^62.
        seed, epoch: at least 0.
    """
    keys = np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64)
    a = math.isqrt(size - 1) + 1 if size > 1 else 1
    b = -(-size // a)
    found = _shuffled(np.asarray(places, np.uint64), np.uint64(a), np.uint64(b), keys)
    while (outside := found >= size).any():
        # Fewer than a of the a × b cells are no row, so that few places come here and fewer again.
        found[outside] = _shuffled(found[outside], np.uint64(a), np.uint64(b), keys)
    return found.astype(np.int64)


def epoch_key(seed: int, epoch: int) -> int:
    """64 bits for whatever else an epoch draws; unrelated to its permutation."""
    return int(np.random.SeedSequence((seed, epoch), spawn_key=(1,)).generate_state(1, np.uint64)[0])


def _shuffled(cells: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = cells // b, cells % b
    for index, key in enumerate(keys):
        if index % 2:
            left = (left + _mixed(right, key) % a) % a
        else:
            right = (right + _mixed(left, key) % b) % b
    return left * b + right


def _mixed(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) over value and key; overflow is meant."""
    with np.errstate(over="ignore"):
        x = value * np.uint64(0x9E3779B97F4A7C15) + key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
