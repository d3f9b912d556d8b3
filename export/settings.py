"""Reading values out of parsed JSON: where a key may stand, of what type it is, and what to say if not.

In: JSON objects with names for messages. Out: checked values. Knows no key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoglm_edge.errors import CheckpointError

MAX_NUMBER = 1e30
"""Bound against absurd files; also keeps inf and nan out."""


@dataclass(frozen=True)
class Settings:
    """JSON objects that may hold the same keys, the first to be asked first; null counts as absent.

    A key that two of them give different values is an error.
    """

    places: Sequence[tuple[str, Mapping[str, Any]]]

    def find(self, key: str, default: Any = None, *, aliases: tuple[str, ...] = ()) -> Any:
        """The value of a key, or of an alias; the default if no object has one."""
        found: list[tuple[str, str, Any]] = []
        for where, values in self.places:
            found += [(where, name, values[name]) for name in (key, *aliases) if values.get(name) is not None]
        for where, name, value in found[1:]:
            if value != found[0][2]:
                raise CheckpointError(
                    f"{found[0][0]} gives {found[0][1]} {found[0][2]!r}, but {where} gives {name} {value!r}; "
                    "make the two agree"
                )
        return found[0][2] if found else default

    def integer(self, key: str, default: int, *, least: int = 1) -> int:
        """An integer that is not below `least`."""
        return self._checked_integer(key, self.find(key, default), least)

    def integer_or_equal_list(self, key: str, default: int) -> int:
        """An integer that may be written as a list of equal integers."""
        value = self.find(key, default)
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                raise CheckpointError(f"{self.where} gives {key} {value}; unequal sides are not supported")
            value = value[0]
        return self._checked_integer(key, value, 1)

    def number(self, key: str, default: float, *, aliases: tuple[str, ...] = ()) -> float:
        """A positive finite number."""
        value = self.find(key, default, aliases=aliases)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_NUMBER:
            raise CheckpointError(f"{self.where} gives {key} {value!r}, must be a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.find(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where} gives {key} {value!r}, must be true or false")
        return value

    def must_be(self, key: str, wanted: str, *, aliases: tuple[str, ...] = ()) -> None:
        """Refuse any other value than this, which is also what absence means."""
        value = self.find(key, wanted, aliases=aliases)
        if value != wanted:
            raise CheckpointError(f"{self.where} gives {key} {value!r}; only {wanted!r} is supported")

    def below(self, *keys: str) -> Settings:
        """The objects under any of these keys, and then the ones they lie in."""
        inner: list[tuple[str, Mapping[str, Any]]] = []
        for where, values in self.places:
            for key in keys:
                value = values.get(key)
                if value is None:
                    continue
                if not isinstance(value, dict):
                    raise CheckpointError(f"{where} gives {key} {value!r}, must be an object")
                inner.append((f"{where.removesuffix(',')}, {key},", value))
        return Settings((*inner, *self.places))

    @property
    def where(self) -> str:
        """The first place, for messages."""
        return self.places[0][0]

    def _checked_integer(self, key: str, value: object, least: int) -> int:
        if type(value) is not int or value < least:
            raise CheckpointError(
                f"{self.where} gives {key} {value!r}, must be an integer of at least {least}"
            )
        return value
