"""Whether a beginning-of-sequence position stands before the first token: the one place where its two kinds have names."""

from __future__ import annotations

# How many positions it takes: an attended BOS is read by the network and seen by every token; a detached one is not there at all.
_SLOTS = {"attended": 1, "detached": 0}


def bos_slots(kind: str) -> int:
    """Positions that a BOS of this kind takes before the first token.

    Raises:
        ValueError: for an unknown kind, with the known ones.
    """
    if kind not in _SLOTS:
        raise ValueError(f"unknown kind of BOS {kind!r}; known are {', '.join(_SLOTS)}")
    return _SLOTS[kind]
