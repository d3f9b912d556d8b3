"""The fields of a JSON object: each is taken once, with its type and range; what nobody took is refused.

In: a JSON object. Out: checked values, or a `ApiError` that names the field. null is the same as absent, as
OpenAI's clients mean it. Knows nothing of what fields there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from autoglm_edge.server.problem import ApiError, refuse


class Fields:
    """One JSON object, taken apart by name."""

    def __init__(self, values: object, what: str = "the request") -> None:
        """Begin with all fields.

        Raises:
            ApiError: it is no object.
        """
        if not isinstance(values, Mapping):
            raise refuse(f"{what} is {kind_of(values)}, must be a JSON object", code="invalid_type")
        self._left: dict[str, Any] = dict(values)
        self._what = what

    def take(self, name: str) -> Any:
        """A value of any type; None if absent."""
        return self._left.pop(name, None)

    def text(self, name: str, *, longest: int | None = None) -> str | None:
        """A string, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise wrong_type(name, value, "a string")
        if value is not None and longest is not None and len(value) > longest:
            raise refuse(f"{name} has {len(value)} characters, must have at most {longest}", name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_type(name, value, "true or false")
        return value

    def choice(self, name: str) -> bool | None:
        """A boolean, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise wrong_type(name, value, "true or false")
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """An integer within bounds, or None."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong_type(name, value, "an integer")
        if not low <= value <= high:
            raise refuse(f"{name} is {shown(value)}, must be from {low} to {high}", name)
        return value

    def number(self, name: str) -> int | float | None:
        """A finite number, or None."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise wrong_type(name, value, "a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise refuse(f"{name} is {value}, must be a finite number", name)
        return value

    def only(self, name: str, *harmless: object, why: str) -> None:
        """A field that is not supported: absent, or one of the values that ask for nothing.

        Raises:
            ApiError: it asks for something.
        """
        value = self.take(name)
        if value is None or any(type(value) is type(item) and value == item for item in harmless):
            return
        raise ApiError(400, f"{name} is not supported: {why}", param=name, code="unsupported_parameter")

    def done(self) -> None:
        """All fields that are known have been taken.

        Raises:
            ApiError: there is another one.
        """
        if self._left:
            name = min(self._left)
            raise ApiError(
                400,
                f"{self._what} has the field {shown(name)}, which this server does not know; remove it",
                param=name if len(name) <= 64 else None,
                code="unknown_parameter",
            )


def kind_of(value: object) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: object) -> str:
    """A value as it may stand in a message: short, whatever it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (bool, int, float)) or value is None:
        return str(value)
    return kind_of(value)


def wrong_type(name: str, value: object, wanted: str) -> ApiError:
    """A value of a wrong type, as a problem."""
    said = kind_of(value) if isinstance(value, (dict, list)) else f"{kind_of(value)} ({shown(value)})"
    return ApiError(400, f"{name} is {said}, must be {wanted}", param=name, code="invalid_type")
