"""Tensors in safetensors files: everything that can be known without reading them is checked first, then they are read one at a time.

The safetensors package refuses headers whose shapes, dtypes and offsets disagree with each other or with the size of the file, overlaps and
holes among them. What it leaves open is checked here: where files lie, how long a header may be, names given twice, dtypes that
torch stores otherwise, and whether an index and its files agree.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evo.files import parse_json, read_json, sync

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 8 << 20
"""Bytes of a header: some 80 000 tensors, of which models of 10 B parameters have less than a thousand."""
INDEX_LIMIT = 16 << 20
"""Bytes of an index."""

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Torch's dtype for each name in a header, where one element is one element in both."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """The tensors of a directory, known from the headers of its files alone.

    Attributes:
        shapes: of every tensor, by name.
        dtypes: of every tensor, by name.
        files: where each tensor is, by name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    files: Mapping[str, Path]
    _open: Mapping[Path, safe_open]

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        weights: str | None = None,
        *,
        within: str | os.PathLike[str] | None = None,
    ) -> Shards:
        """The tensors of a directory, after all checks and before any of them is read.

        Args:
            directory: where the files are.
            weights: a safetensors file, or the JSON index of several (a name that ends in .json, Hugging Face's layout), by its plain name;
                None is `model.safetensors`, or else `model.safetensors.index.json`.
            within: files must lie under this directory once links are followed; None is `directory`. The snapshots of a Hugging Face
                cache are links into the folder of their repository: hand over that folder.

        Raises:
            FileNotFoundError: where the weights, the index or a shard it names are not there.
            ValueError: for anything damaged, inconsistent or out of place, with the file and what is wrong with it.
        """
        place = _Place(Path(directory), Path(directory if within is None else within))
        if weights is None:
            weights = INDEX if not (place.directory / WEIGHTS).exists() else WEIGHTS
            if not (place.directory / weights).exists():
                raise FileNotFoundError(f"no weights in {directory}: it has neither {WEIGHTS} nor {INDEX}")
        if not weights.endswith(".json"):
            return cls._of({(file := place.file(weights)): _checked(file)})
        index = place.file(weights)
        shard_of = _shard_names(index)
        paths = {shard: place.file(shard) for shard in sorted(set(shard_of.values()))}
        shards = cls._of({path: _checked(path) for path in paths.values()})
        _check_index(index, {name: paths[shard] for name, shard in shard_of.items()}, shards.files)
        return shards

    @classmethod
    def _of(cls, opened: Mapping[Path, safe_open]) -> Shards:
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        files: dict[str, Path] = {}
        for path, file in opened.items():
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in files:
                    raise ValueError(f"{path} and {files[name]} both hold a tensor {name!r}; each must be in one file")
                entry = file.get_slice(name)
                kind = entry.get_dtype()
                if kind not in DTYPES:
                    raise ValueError(f"{path} holds {name!r} as {kind}; this library reads {', '.join(DTYPES)}")
                shapes[name], dtypes[name], files[name] = tuple(entry.get_shape()), DTYPES[kind], path
        return cls(shapes=shapes, dtypes=dtypes, files=files, _open=opened)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own (a later change of the file does not reach it).

        Raises:
            KeyError: for a name that is not in `shapes`.
        """
        return self._open[self.files[name]].get_tensor(name).clone()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors`, no two of which share memory, and `metadata` to a safetensors file, and have it on the disk before going on.

    Raises:
        OSError: where the disk refuses.
    """
    # safetensors makes files that nobody else may read; this one gets the permissions of any other new file.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    path.chmod(mode)
    sync(path)


def _checked(path: Path) -> safe_open:
    """A safetensors file whose header has been checked; its tensors are read when asked for.

    Raises:
        ValueError: where the header contradicts itself or the file, is too long, or names a tensor twice.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER_LIMIT, size - 8):
            raise ValueError(
                f"{path} has {size} bytes and announces a header of {length}: it is damaged or was altered (a header has at most "
                f"{HEADER_LIMIT} bytes, and must be in the file); copy it again"
            )
        parse_json(file.read(length), f"the header of {path}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or was altered ({error}); copy it again") from error


@dataclass(frozen=True)
class _Place:
    directory: Path
    within: Path

    def file(self, name: str) -> Path:
        """A regular file of the directory by its plain name."""
        if name in ("", ".", "..") or len(name) > 200 or any(character in name for character in "/\\:\0"):
            raise ValueError(
                f"{name[:200]!r} is not the plain name of a file in {self.directory}; paths are not followed"
            )
        path = self.directory / name
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: copy the directory whole")
        if not path.resolve().is_relative_to(self.within.resolve()):
            raise ValueError(f"{path} is a link to {path.resolve()}, outside {self.within}: put the file itself there")
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is not a regular file")
        return path


def _shard_names(index: Path) -> dict[str, str]:
    """The file of every tensor, as an index says."""
    data = read_json(index, INDEX_LIMIT)
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise ValueError(f"{index} has no weight_map from names of tensors to names of files; it is not an index")
    return names


def _check_index(index: Path, said: Mapping[str, Path], found: Mapping[str, Path]) -> None:
    missing, surplus = sorted(said.keys() - found.keys()), sorted(found.keys() - said.keys())
    moved = [
        f"{name} in {found[name].name} instead of {said[name].name}"
        for name in sorted(said.keys() & found.keys())
        if said[name] != found[name]
    ]
    if missing or surplus or moved:
        raise ValueError(
            f"{index} and its files do not agree: not in the files {missing[:4]}, not in the index {surplus[:4]}, "
            f"elsewhere {moved[:4]}; copy the directory whole"
        )
