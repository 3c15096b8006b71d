"""The entries of somebody else's `config.json`, read without trust."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entries:
    """A JSON object whose entries are asked for by name and type. An entry that is null counts as missing.

    Args:
        data: the object.
        source: where it came from, for errors.
    """

    data: Mapping[str, Any]
    source: str

    def integer(self, name: str, default: int | None = None) -> int:
        """A count, from 1 to 2³¹ - 1.

        Raises:
            ValueError: if it is anything else, or missing without a default.
        """
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error(name, "a whole number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0; errors as those of `integer`."""
        value = self._get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(name, "a finite number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; errors as those of `integer`."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def has(self, name: str) -> bool:
        """Whether it is there and not null."""
        return self.data.get(name) is not None

    def says_none(self, name: str) -> bool:
        """Whether it is there and null, where that says more than its absence."""
        return name in self.data and self.data[name] is None

    def within(self, name: str) -> Entries:
        """The object of this name; an empty one if it is missing."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return Entries(value, f"{name} of {self.source}")

    def only(self, name: str, *known: object, default: object) -> None:
        """Refuse a model that has another value here than the ones that this library computes.

        Raises:
            ValueError: with the value and the known ones.
        """
        if self._get(name, default) not in known:
            raise self.error(name, " or ".join(map(repr, known)) + ", which is what this library computes")

    def error(self, name: str, needed: str) -> ValueError:
        """What to raise for an entry that is not what is needed."""
        return ValueError(f"{name!r} is {self.data.get(name)!r} in {self.source}; it should be {needed}")

    def _get(self, name: str, default: object) -> Any:
        value = self.data.get(name)
        return default if value is None else value
