"""Files that are there whole or not at all, also after a kill or a power cut, and JSON that is read without trust."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

DEPTH_LIMIT = 32
"""How deep lists and objects may be nested in a JSON file."""


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, replacing what was there in one move."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, replacing what was there in one move."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def read_json(path: Path, limit: int) -> Any:
    """The value in a JSON file of at most `limit` bytes.

    Raises:
        ValueError: for a file that is longer, or for what `parse_json` refuses.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {limit} are read")
    return parse_json(data, str(path))


def parse_json(data: bytes, source: str) -> Any:
    """The value of JSON text in UTF-8, in which every name is given once, every number is finite and integers fit 64 bits.

    Raises:
        ValueError: for anything else, and for nesting deeper than `DEPTH_LIMIT`; `source` says where it came from.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_small,
            parse_float=_finite,
            parse_constant=_not_a_number,
        )
    except RecursionError as error:
        raise ValueError(f"{source} is nested deeper than {DEPTH_LIMIT} levels") from error
    except ValueError as error:
        raise ValueError(f"{source} is not sound JSON ({error}): it was cut short or altered; copy it again") from error
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH_LIMIT:
            raise ValueError(f"{source} is nested deeper than {DEPTH_LIMIT} levels")
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} is given twice")
        found[name] = value
    return found


def _small(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**63
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"the integer {text[:24]} does not fit 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:24]} is too large")
    return value


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def sync(path: Path) -> None:
    """Have the contents of a file, or the entries of a folder, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
