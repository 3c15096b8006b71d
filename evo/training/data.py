"""Text on disk as one long row of byte tokens in a memory map, and batches as a pure function of (seed, step).

Documents are wrapped BOS … EOS and laid end to end, uint16, in two files: `train.bin` and `held_out.bin`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evo.core.files import sync, write_json
from evo.text import BOS, EOS
from evo.training.config import CorpusConfig
from evo.training.seeds import Purpose, derive

_LAYOUT = 1
_TOKEN = np.dtype("<u2")
_CHUNK = 1 << 24  # bytes read at once: the memory that a file of any size needs


@dataclass(frozen=True)
class _Document:
    """Bytes [start, stop) of one file."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Two streams of tokens, 1-D uint16 memory maps, and the SHA-256 of their contents."""

    train: np.ndarray
    held_out: np.ndarray
    fingerprint: str

    def batch(self, seed: int, step: int, batch_size: int, length: int) -> Tensor:
        """Crops of the training stream at random places, (batch_size, length) int64: a pure function of its arguments.

        Raises `ValueError` where the stream is shorter than one crop.
        """
        last = _last_start(self.train, length, "training")
        generator = np.random.Generator(np.random.PCG64(derive(seed, Purpose.DATA, step)))
        return _crops(self.train, generator.integers(0, last + 1, batch_size), length)

    def held_out_batch(self, count: int, length: int) -> Tensor:
        """At most `count` crops of the held-out stream that do not overlap, spread evenly over it, (S, length) int64.

        Always the same ones. Raises `ValueError` where the stream is shorter than one crop.
        """
        _last_start(self.held_out, length, "held-out")
        available = len(self.held_out) // length
        places = np.unique(np.linspace(0, available - 1, min(count, available)).round().astype(np.int64))
        return _crops(self.held_out, places * length, length)


def open_corpus(source: Path, cache: Path, config: CorpusConfig, *, progress: bool = False) -> Corpus:
    """The corpus of `source`, a file or a folder, tokenized into the folder `cache` or reused from it.

    What is there is reused while names, sizes and times of the source and the options are those it was made from.
    A folder is split by file, each falling to one side by a hash of its relative path, so that a file stays on its side
    when others come and go (of two files or more each side has at least one). A single file is split by position: its
    end is held out.

    Raises `FileNotFoundError` where `source` is not there, and `ValueError` where it holds no text.
    """
    manifest = cache / "manifest.json"
    signature, train, held_out = _survey(source, config)
    known = _read_manifest(manifest)
    if known is None or known["signature"] != signature:
        cache.mkdir(parents=True, exist_ok=True)
        # Without a manifest the streams count as absent: a kill between here and the end leaves nothing half-valid.
        manifest.unlink(missing_ok=True)
        total = sum(document.stop - document.start for document in train + held_out)
        quiet = not (progress and sys.stderr.isatty())
        with tqdm(total=total, desc="reading", unit="B", unit_scale=True, leave=False, delay=1, disable=quiet) as bar:
            parts = {
                name: _write_stream(cache / f"{name}.bin", documents, bar)
                for name, documents in (("train", train), ("held_out", held_out))
            }
        known = {"signature": signature, "streams": parts}
        write_json(manifest, known)
    streams = {name: np.memmap(cache / f"{name}.bin", dtype=_TOKEN, mode="r") for name in known["streams"]}
    fingerprint = hashlib.sha256("".join(part["sha256"] for part in known["streams"].values()).encode()).hexdigest()
    return Corpus(train=streams["train"], held_out=streams["held_out"], fingerprint=fingerprint)


def _survey(source: Path, config: CorpusConfig) -> tuple[str, list[_Document], list[_Document]]:
    """A signature that changes with the source, and the documents of either side."""
    if not source.exists():
        raise FileNotFoundError(f"no file or folder at {source}: give a text file, or a folder of text files")
    files = list(_text_files(source, config)) if source.is_dir() else [source]
    sizes = {file: file.stat().st_size for file in files}
    files = [file for file in files if sizes[file]]
    if not files:
        wanted = f" ending in {', '.join(config.suffixes)}" if config.suffixes else ""
        what = f"holds no text files{wanted}: check the path and the suffixes" if source.is_dir() else "is empty"
        raise ValueError(f"{source} {what}; training needs text")
    names = [file.relative_to(source).as_posix() if source.is_dir() else file.name for file in files]
    facts = [(name, sizes[file], file.stat().st_mtime_ns) for name, file in zip(names, files, strict=True)]
    signature = hashlib.sha256(json.dumps([_LAYOUT, asdict(config), facts]).encode()).hexdigest()
    if len(files) == 1:
        size = sizes[files[0]]
        cut = round(size * (1 - config.held_out))
        return signature, [_Document(files[0], 0, cut)], [_Document(files[0], cut, size)]
    turns = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names]
    # The extremes are dealt beforehand, so that neither side of a small folder is empty.
    limit = min(max(config.held_out, min(turns)), np.nextafter(max(turns), 0))
    whole = [(turn <= limit, _Document(file, 0, sizes[file])) for turn, file in zip(turns, files, strict=True)]
    return signature, [d for held, d in whole if not held], [d for held, d in whole if held]


def _text_files(folder: Path, config: CorpusConfig) -> Iterator[Path]:
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in config.exclude)
        for name in sorted(names):
            path = Path(place, name)
            if not name.startswith(".") and name.endswith(config.suffixes or "") and path.is_file() and _is_text(path):
                yield path


def _is_text(path: Path) -> bool:
    # A zero byte early on is what tells binary files from text, as in git.
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _write_stream(target: Path, documents: list[_Document], bar: tqdm) -> dict[str, object]:
    temporary = target.with_suffix(".tmp")
    digest = hashlib.sha256()
    with temporary.open("wb") as sink:
        for document in documents:
            for part in _tokens(document):
                digest.update(part.data)
                sink.write(part.data)
                bar.update(len(part))
    sync(temporary)
    os.replace(temporary, target)
    return {
        "tokens": target.stat().st_size // _TOKEN.itemsize,
        "documents": len(documents),
        "sha256": digest.hexdigest(),
    }


def _tokens(document: _Document) -> Iterator[np.ndarray]:
    yield np.array([BOS], _TOKEN)
    with document.path.open("rb") as file:
        file.seek(document.start)
        left = document.stop - document.start
        while left and (data := file.read(min(left, _CHUNK))):
            left -= len(data)
            yield np.frombuffer(data, np.uint8).astype(_TOKEN)
    yield np.array([EOS], _TOKEN)


def _read_manifest(path: Path) -> dict | None:
    """The manifest, or None where there is none or its streams are not as long as it says."""
    if not path.exists():
        return None
    manifest = json.loads(path.read_text())
    for name, part in manifest["streams"].items():
        stream = path.with_name(f"{name}.bin")
        if not stream.exists() or stream.stat().st_size != _TOKEN.itemsize * part["tokens"]:
            return None
    return manifest


def _last_start(stream: np.ndarray, length: int, name: str) -> int:
    if len(stream) < length:
        raise ValueError(
            f"the {name} text has {len(stream)} tokens, a sequence needs {length}: give more text or a shorter length"
        )
    return len(stream) - length


def _crops(stream: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    return torch.from_numpy(stream[starts[:, None] + np.arange(length)].astype(np.int64))
