"""Tokenizers and data sets of the Hugging Face hub. Needs the extra `data`."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from evo.data.encoding import Encoding


@dataclass(frozen=True)
class _Encode:
    tokenizer: Any

    def __call__(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int64)


def huggingface_encoding(tokenizer: Any, *, bos: int | None = None, eos: int | None = None) -> Encoding:
    """A tokenizer of transformers, as an `Encoding`.

    Args:
        tokenizer: a fast tokenizer, or the name or folder of one.
        bos, eos: ids that begin and end a document; None are the tokenizer's own. One that has no bos begins with its eos.

    Raises:
        ImportError: without transformers.
        ValueError: for a tokenizer that is no fast one, or that has neither bos nor eos.
    """
    if isinstance(tokenizer, str):
        tokenizer = _module("transformers").AutoTokenizer.from_pretrained(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is no fast tokenizer, and what it does cannot be told by a fingerprint: "
            "convert it (transformers.AutoTokenizer with use_fast=True)"
        )
    end = tokenizer.eos_token_id if eos is None else eos
    begin = bos if bos is not None else tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    if begin is None:
        raise ValueError("the tokenizer has neither a bos nor an eos token: give bos=, the id that begins a document")
    return Encoding(
        encode=_Encode(tokenizer),
        vocabulary=len(tokenizer),
        bos=begin,
        eos=end,
        fingerprint=hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    )


def huggingface_texts(name: str, *, column: str = "text", skip: int = 0, **options: Any) -> Iterator[str]:
    """The texts of a data set of the hub, streamed.

    Args:
        name: of the data set, or a format ("json", "parquet") of `data_files`.
        column: that holds the text.
        skip: texts left out from the beginning, without being downloaded where the data set knows how.
        options: of `datasets.load_dataset`, `split="train"` among them unless said otherwise.

    Raises:
        ImportError: without datasets.
        ValueError: for a column that the data set does not have.
    """
    found = _module("datasets").load_dataset(name, **{"split": "train", **options, "streaming": True})
    return _column(found.skip(skip) if skip else found, name, column)


def _column(rows: Any, name: str, column: str) -> Iterator[str]:
    for row in rows:
        if column not in row:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(map(repr, row))}")
        yield row[column]


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}: pip install 'evo-lm[data]'") from error
