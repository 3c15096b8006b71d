"""Text on disk: which files of a folder are read, and what of it is held out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from evo.data.writing import FilePart

PackingName = Literal["contiguous", "best_fit"]

_LONGEST = 16 << 20  # bytes of a text; longer files are several
_LINE = 1 << 16  # bytes in which a line is expected to end
_LAYOUT = 2


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which text is read, how it is split, and how documents are laid into sequences."""

    suffixes: tuple[str, ...] = ()
    """Of a folder, read only files that end so, e.g. .py .md; by default every file that is text."""
    exclude: tuple[str, ...] = ("__pycache__", "site-packages", "dist-packages", "node_modules")
    """Folders of these names are passed over; so is everything whose name begins with a dot."""
    held_out: float = 0.05
    """Share kept from training: of a folder by file (a hash of its relative path decides), of a single file its end."""
    packing: PackingName = "contiguous"
    """contiguous cuts the text at every sequence's end; best_fit cuts only documents longer than a sequence, and pads a little."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"corpus.held_out is {self.held_out!r}; needed: a share between 0 and 1, e.g. 0.05")
        if self.packing not in get_args(PackingName):
            raise ValueError(f"corpus.packing is {self.packing!r}; needed: {' or '.join(get_args(PackingName))}")


@dataclass(frozen=True)
class Survey:
    """What a source holds, without having read it.

    Attributes:
        signature: changes with names, sizes and times of the files, and with options that decide what is read.
        train, held_out: the texts of either side.
    """

    signature: str
    train: tuple[FilePart, ...]
    held_out: tuple[FilePart, ...]

    @property
    def bytes(self) -> int:
        """Of all texts."""
        return sum(map(len, self.train + self.held_out))


def survey(source: Path, config: CorpusConfig, encoding: str) -> Survey:
    """The texts of `source`, a file or a folder, to be read with the tokenizer of this fingerprint.

    A folder is split by file, each falling to one side by a hash of its relative path, so that a file stays on its side when others come
    and go (of two files or more each side has at least one). A single file is split by position: its end is held out. A text is a
    document; files longer than 16 MB are several, cut at line ends.

    Raises:
        FileNotFoundError: where `source` is not there.
        ValueError: where it holds no text, or a single file too little to be split.
    """
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
    asked = [_LAYOUT, encoding, config.suffixes, config.exclude, config.held_out]
    signature = hashlib.sha256(json.dumps([asked, facts]).encode()).hexdigest()
    if len(files) == 1:
        size = sizes[files[0]]
        cut = round(size * (1 - config.held_out))
        if not 0 < cut < size:
            raise ValueError(
                f"{files[0]} has {size} bytes, of which corpus.held_out {config.held_out:g} holds out {size - cut}; "
                "needed: one or more to train on and to hold out. Give more text, or another share"
            )
        return Survey(signature, tuple(_parts(files[0], 0, cut)), tuple(_parts(files[0], cut, size)))
    turns = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names]
    # The extremes are dealt beforehand, so that neither side of a small folder is empty.
    limit = min(max(config.held_out, min(turns)), np.nextafter(max(turns), 0))
    sides: dict[bool, list[FilePart]] = {False: [], True: []}
    for turn, file in zip(turns, files, strict=True):
        sides[turn <= limit].extend(_parts(file, 0, sizes[file]))
    return Survey(signature, tuple(sides[False]), tuple(sides[True]))


def reads(source: Path, folder: Path, config: CorpusConfig) -> bool:
    """Whether the JSON that a run writes to `folder` would be text of `source`."""
    if not source.is_dir() or not folder.resolve().is_relative_to(source.resolve()):
        return False
    between = folder.resolve().relative_to(source.resolve()).parts
    passed_over = any(name.startswith(".") or name in config.exclude for name in between)
    return not passed_over and any(name.endswith(config.suffixes or "") for name in (".json", ".jsonl"))


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


def _parts(path: Path, start: int, stop: int) -> Iterator[FilePart]:
    while stop - start > _LONGEST:
        with path.open("rb") as file:
            file.seek(start + _LONGEST - _LINE)
            # Without a line end it is cut where it is.
            line = file.read(_LINE).rfind(b"\n") + 1
        end = start + _LONGEST - (_LINE - line if line else 0)
        yield FilePart(path, start, end)
        start = end
    if start < stop:
        yield FilePart(path, start, stop)
