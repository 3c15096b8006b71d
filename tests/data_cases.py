"""Folders of text, and corpora made of them, for the tests of `evo.data`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evo.data import Corpus, Encoding, Packing, TokenShards, write_shards
from evo.data.packing import CONTIGUOUS
from evo.text import BOS, EOS, ByteTokenizer


def letters(text: str) -> list[int]:
    """Ids of a tokenizer for tests: a is 2, b is 3, ..."""
    return [ord(character) - ord("a") + 2 for character in text]


LETTERS = Encoding(encode=letters, vocabulary=28, bos=0, eos=1, fingerprint="letters")


def word_tokenizer() -> Any:
    """A tokenizer of transformers that knows two words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "one": 3, "two": 4}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Files of these contents."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def texts(shards: TokenShards) -> list[bytes]:
    """The documents of shards of bytes, each without its BOS and EOS, which are checked."""
    found, start = [], 0
    for end in np.concatenate(list(shards.all_ends())).tolist():
        ids = shards.read(start, end)
        assert ids[0] == BOS
        assert ids[-1] == EOS
        found.append(ByteTokenizer().decode_bytes(torch.from_numpy(ids.astype(np.int64))))
        start = end
    assert start == shards.tokens
    return found


def corpus(
    folder: Path, documents: Iterable[str], packing: Packing = CONTIGUOUS, shard_bytes: int = 40, held_out: str = "abc"
) -> Corpus:
    """A corpus of these texts in letters."""
    return Corpus(
        train=write_shards(documents, LETTERS, folder / "train", shard_bytes=shard_bytes),
        held_out=write_shards([held_out], LETTERS, folder / "held_out"),
        packing=packing,
    )


def of_lengths(lengths: Sequence[int]) -> list[str]:
    """Texts of letters whose documents, BOS and EOS included, have these lengths (at least 3)."""
    return [
        "".join(chr(ord("a") + (7 * at + number) % 26) for at in range(length - 2))
        for number, length in enumerate(lengths)
    ]
