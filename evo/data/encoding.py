"""How texts become token ids, as what is written to disk remembers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Literal

import numpy as np

from evo.text import BOS, EOS, ByteTokenizer


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A tokenizer, as far as preparing data needs one. Every document is written as `bos`, its ids, `eos`.

    Writers in several processes need `encode` to be picklable: a function of a module, or an object of a class of one.

    Args:
        encode: one text -> its ids, without specials: a sequence of ints or a 1-D array.
        vocabulary: V; ids lie in [0, V).
        bos: id that begins every document; a tokenizer without one lends its eos.
        eos: id that ends it; None is no such token.
        fingerprint: names the tokenizer, so that data and models that do not belong together are told apart.
        errors: what becomes of bytes in files that are no UTF-8: "replace", or "surrogateescape" for an `encode` that takes it back.

    Raises:
        TypeError: for an `encode` that cannot be called, a `bos` that is no int, or an `eos` that is neither int nor None.
        ValueError: for a vocabulary that its own special ids do not fit, or that uint32 does not hold.
    """

    encode: Callable[[str], Sequence[int] | np.ndarray]
    vocabulary: int
    bos: int
    eos: int | None
    fingerprint: str
    errors: Literal["replace", "surrogateescape"] = "replace"

    def __post_init__(self) -> None:
        if not callable(self.encode):
            raise TypeError(f"encode is {self.encode!r}; a function from a text to its ids is needed")
        for name, kinds in (("bos", int), ("eos", (int, NoneType))):
            if not isinstance(token := getattr(self, name), kinds):
                raise TypeError(f"{name} is {token!r}; the id of a token is needed{', or None' * (name == 'eos')}")
        if not 1 <= self.vocabulary <= 1 << 32:
            raise ValueError(f"a vocabulary of {self.vocabulary} entries; ids are stored in 32 bits at most")
        for name, token in (("bos", self.bos), ("eos", self.eos)):
            if token is not None and not 0 <= token < self.vocabulary:
                raise ValueError(f"{name} is {token}; ids of this vocabulary lie in [0, {self.vocabulary})")

    @property
    def dtype(self) -> np.dtype:
        """Of ids on disk: little-endian uint16 where they fit, else uint32."""
        return np.dtype("<u2" if self.vocabulary <= 1 << 16 else "<u4")

    def document(self, text: str) -> np.ndarray:
        """`bos`, the ids of a text, `eos`: (n,) of `dtype`; (0,) for a text without any id.

        Raises:
            TypeError: for ids that are no integers.
            ValueError: for ids outside the vocabulary.
        """
        ids = np.asarray(self.encode(text))
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"the tokenizer gave ids of type {ids.dtype}; integers are needed")
        if not ids.size:
            return np.empty(0, self.dtype)
        low, high = ids.min(), ids.max()
        if ids.ndim != 1 or low < 0 or high >= self.vocabulary:
            raise ValueError(
                f"the tokenizer gave ids of shape {ids.shape} between {low} and {high}; "
                f"(n,) in [0, {self.vocabulary}) is needed: hand over the vocabulary with all its added tokens"
            )
        end = [] if self.eos is None else [self.eos]
        return np.concatenate([[self.bos], ids, end]).astype(self.dtype)


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)


BYTES = Encoding(
    encode=_bytes,
    vocabulary=ByteTokenizer.vocab_size,
    bos=BOS,
    eos=EOS,
    fingerprint="utf-8 bytes, BOS 256, EOS 257",
    errors="surrogateescape",
)
"""The bytes of a text, whatever they are: what `evo.text.ByteTokenizer` reads."""
