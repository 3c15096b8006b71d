"""Text: what it is, how it is cut into tokens, and how many bytes tokens stand for.

T tokens of a text, S windows, N tokens of a window.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.ablation.data import Data
from benchmarks.ablation.files import read_text

# Of the standard library, what is not a test or a program of its own; about a twentieth of the files is for testing.
PYTHON_EXCLUDED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes to be tested on."""

    train: bytes
    test: bytes


def wikitext() -> Text:
    """WikiText-2, its tokens as they are printed. Tested on the validation part. Raises `Absent` where it is not there."""
    return Text(read_text("wikitext-2/train.txt.xz").encode(), read_text("wikitext-2/valid.txt.xz").encode())


def shakespeare() -> Text:
    """Tiny Shakespeare, its last tenth for testing. Raises `Absent` where it is not there."""
    data = read_text("tinyshakespeare/input.txt.xz").encode()
    cut = len(data) * 9 // 10
    return Text(data[:cut], data[cut:])


def python() -> Text:
    """The standard library of the running interpreter, divided by a hash of each file's name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sides: dict[bool, list[bytes]] = {True: [], False: []}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if not PYTHON_EXCLUDED & set(name.parts):
            sides[hashlib.sha256(name.as_posix().encode()).digest()[0] < 13].append(file.read_bytes())
    return Text(b"\n".join(sides[False]), b"\n".join(sides[True]))


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text and its cut into tokens.

    Args:
        text: reads it.
        vocabulary: entries of a byte-pair encoding trained on the training part; None is bytes.
    """

    text: Callable[[], Text]
    vocabulary: int | None = None


CORPORA: Mapping[str, Corpus] = {
    "wikitext-bytes": Corpus(text=wikitext),
    "wikitext-bpe": Corpus(text=wikitext, vocabulary=1024),
    "shakespeare": Corpus(text=shakespeare),
    "python": Corpus(text=python),
}


@lru_cache(maxsize=8)
def windows(name: str, length: int, test_size: int, folder: Path) -> Data:
    """A corpus as crops of `length` tokens to train on and at most `test_size` windows, evenly spread, to be tested on.

    Tokens are kept in `folder`.

    Raises:
        Absent: where the text is not there.
        ImportError: for a byte-pair encoding without the package that makes it.
    """
    corpus = CORPORA[name]
    text = corpus.text()
    if corpus.vocabulary is None:
        train, test = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text.train, text.test))
        spelling = tuple(bytes([value]) for value in range(256))
    else:
        train, test, spelling = _encoded(text, corpus.vocabulary, folder)
    available = len(test) // length
    if len(train) < length or not available:
        raise ValueError(f"{name} has {len(train)} tokens to train on and {len(test)} to test on, fewer than {length}")
    places = torch.linspace(0, available - 1, min(test_size, available)).round().long()
    held_out = test[places[:, None] * length + torch.arange(length)].long()
    return Data(
        vocab_size=len(spelling),
        length=length,
        prompt_length=0,
        train=train,
        test=held_out,
        spelling=spelling,
    )


def _encoded(text: Text, size: int, folder: Path) -> tuple[Tensor, Tensor, tuple[bytes, ...]]:
    """Tokens of both parts, (T,) int32 each, and the bytes of each entry."""
    digest = hashlib.sha256(text.train + text.test).hexdigest()[:16]
    file = folder / f"byte-pairs-{size}-{digest}.safetensors"
    if not file.is_file():
        tokenizer = _byte_pairs(text.train, size)
        symbols = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        entries = [_bytes(symbol) for symbol, _ in symbols]
        parts = {
            "train": torch.tensor(tokenizer.encode(text.train.decode()).ids, dtype=torch.int32),
            "test": torch.tensor(tokenizer.encode(text.test.decode()).ids, dtype=torch.int32),
            "spelling": torch.frombuffer(bytearray(b"".join(entries)), dtype=torch.uint8),
            "lengths": torch.tensor([len(entry) for entry in entries], dtype=torch.int64),
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(parts, file)
    parts = load_file(file)
    spelling = parts["spelling"].split(parts["lengths"].tolist())
    return parts["train"], parts["test"], tuple(bytes(entry.tolist()) for entry in spelling)


def _bytes(symbol: str) -> bytes:
    """What a symbol of a byte-level encoding stands for: bytes that print are themselves, the others the characters from 256 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [value for value in range(256) if value not in printing]
    return bytes(ord(letter) if ord(letter) in printing else others[ord(letter) - 256] for letter in symbol)


def _byte_pairs(data: bytes, size: int) -> Any:
    try:
        from tokenizers import Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel
        from tokenizers.trainers import BpeTrainer
    except ImportError as error:
        raise ImportError("a byte-pair encoding is made by tokenizers: pip install 'evo-lm[hf]'") from error
    tokenizer: Any = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=size, initial_alphabet=ByteLevel.alphabet(), special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(data.decode().splitlines(keepends=True), trainer)
    return tokenizer
