"""Frozen dataclasses to JSON and back, checked entry by entry."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(part: Any) -> dict[str, Any]:
    """The entries of a dataclass, by name; a dataclass among them says of what kind it is by an entry `name`."""
    found = {}
    for entry in fields(part):
        value = getattr(part, entry.name)
        found[entry.name] = {"name": type(value).__name__, **to_json(value)} if is_dataclass(value) else value
    return found


def from_json(kind: type[T], data: Mapping[str, Any], what: str) -> T:
    """The dataclass of a JSON object; entries that are dataclasses already stay as they are.

    Raises:
        ValueError: for an unknown, missing or wrongly typed entry, with its name and that of `what`.
    """
    hints = typing.get_type_hints(kind)
    known = {entry.name: entry for entry in fields(typing.cast(Any, kind))}
    unknown = sorted(map(str, set(data) - set(known)))
    if unknown:
        raise ValueError(f"unknown entries {unknown} in {what}; known are {sorted(known)}")
    needed = {name for name, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING}
    missing = sorted(needed - set(data))
    if missing:
        raise ValueError(f"{what} needs {missing}, which are missing")
    return kind(**{name: _entry(name, value, hints[name], what) for name, value in data.items()})


def _entry(name: str, value: object, declared: Any, what: str) -> object:
    kinds = typing.get_args(declared) if typing.get_origin(declared) is not Mapping else ()
    kinds = kinds or (declared,)
    parts = {kind.__name__: kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)}
    if parts and isinstance(value, Mapping):
        if value.get("name") not in list(parts):  # of a list, since the name may be anything, also what has no hash
            raise ValueError(f"{name} in {what} is {value.get('name')!r}; known are {', '.join(parts)}")
        entries = {key: entry for key, entry in value.items() if key != "name"}
        return from_json(parts[value["name"]], entries, f"{name} of {what}")
    if not any(_fits(value, kind) for kind in kinds):
        raise ValueError(
            f"{name!r} is {value!r} in {what}; it should be "
            f"{' or '.join('None' if kind is NoneType else getattr(kind, '__name__', str(kind)) for kind in kinds)}, "
            "positive where it counts something"
        )
    return value


def _fits(value: object, kind: Any) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, typing.get_origin(kind) or kind)
