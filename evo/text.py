"""Text as bytes: the tokenizer that needs no vocabulary file and never meets an unknown character."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BOS, EOS, PAD = 256, 257, 258


class ByteTokenizer:
    """Bytes of UTF-8 text as tokens 0–255, followed by the specials BOS (256), EOS (257) and PAD (258).

    It has no state: any two are interchangeable.
    """

    bos_id = BOS
    eos_id = EOS
    pad_id = PAD
    vocab_size = 259

    def encode(self, text: str | bytes, *, bos: bool = False, eos: bool = False) -> Tensor:
        """Token ids, (n,) int64, of `text`, with BOS before and EOS behind on request.

        Text is encoded as UTF-8; the surrogates by which Python carries undecodable bytes of arguments and file
        names become those bytes again. Any other lone surrogate raises `UnicodeEncodeError`.
        """
        data = text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogateescape")
        return torch.tensor([BOS] * bos + list(data) + [EOS] * eos, dtype=torch.int64)

    def decode_bytes(self, tokens: Tensor | Iterable[int]) -> bytes:
        """The bytes of one sequence of ids, (n,), without specials. Raises `ValueError` for an id outside [0, 259)."""
        if isinstance(tokens, Tensor) and tokens.ndim != 1:
            raise ValueError(f"decode one sequence at a time: tokens of shape {tuple(tokens.shape)} given, (n,) needed")
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside [0, {self.vocab_size}): not a byte nor a special")
        return bytes(token for token in ids if token < BOS)

    def decode(self, tokens: Tensor | Iterable[int]) -> str:
        """The text of one sequence of ids, (n,); specials are left out, bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")
