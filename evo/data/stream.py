"""Batches of texts that are never written to disk: a stream that may not end, and that is read in the order it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from evo.data.encoding import Encoding
from evo.data.packing import Packed


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """How far a stream has been read, from which it is gone on with.

    Attributes:
        texts: that have been used up.
        tokens: of the next one that have been used.
    """

    texts: int = 0
    tokens: int = 0


def stream_batches(
    texts: Iterable[str],
    encoding: Encoding,
    *,
    rows: Sequence[int],
    total: int,
    length: int,
    state: StreamState = StreamState(),
    skipped: int = 0,
) -> Iterator[tuple[Packed, StreamState]]:
    """Batches of a stream of texts, cut every `length` tokens, each with the state behind it.

    Every rank reads all texts and keeps its own rows, so that batches do not depend on how many ranks there are; where reading or encoding
    is what takes time, write shards first. Texts come in the order of the stream: shuffle them there.

    Args:
        texts: from the first one on, whatever the state is: those used up are passed over without being encoded.
        encoding: of the texts.
        rows: which of the `total` rows of each batch, in [0, total).
        total: rows of a whole batch.
        length: tokens of a row, N.
        state: where to go on.
        skipped: texts that whoever made `texts` has left out already, at most `state.texts`.

    Yields:
        Packed of (len(rows), N), without padding, and the state. What does not fill a batch at the end is left out.

    Raises:
        ValueError: for rows that the batch does not have, or `skipped` beyond the state.
    """
    if not len(rows) or not all(0 <= row < total for row in rows):
        raise ValueError(f"rows {list(rows)} of a batch of {total}; needed: at least one, each in [0, {total})")
    if not 0 <= skipped <= state.texts:
        raise ValueError(
            f"{skipped} texts were skipped, {state.texts} have been used: the stream would not go on there"
        )
    return _batches(texts, encoding, list(rows), total, length, state, skipped)


def _batches(
    texts: Iterable[str],
    encoding: Encoding,
    rows: list[int],
    total: int,
    length: int,
    state: StreamState,
    skipped: int,
) -> Iterator[tuple[Packed, StreamState]]:
    size = total * length
    ids, numbers = np.empty(size, np.int64), np.empty(size, np.int64)
    filled = 0
    used, begin = state.texts, state.tokens
    for number, text in enumerate(islice(texts, state.texts - skipped, None)):
        document = encoding.document(text)
        while begin < len(document):
            count = min(size - filled, len(document) - begin)
            ids[filled : filled + count] = document[begin : begin + count]
            numbers[filled : filled + count] = number
            filled, begin = filled + count, begin + count
            if filled == size:
                whole = begin == len(document)
                behind = StreamState(texts=used + whole, tokens=0 if whole else begin)
                yield _packed(ids, numbers, rows, length), behind
                filled = 0
        used, begin = used + 1, 0


def _packed(ids: np.ndarray, numbers: np.ndarray, rows: list[int], length: int) -> Packed:
    tokens, documents = (torch.from_numpy(each.reshape(-1, length)[rows]) for each in (ids, numbers))
    return Packed(
        tokens=tokens,
        documents=documents - documents[:, :1],
        loss_mask=torch.ones(tokens.shape, dtype=torch.bool),
    )
