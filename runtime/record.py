"""A frozen dataclass out of parsed JSON: by its annotations, and by nothing else.

In: a dataclass, and what json.loads gave. Out: an instance of it, or an error that names the place. Keys must
be the fields, and values of their types. Knows nothing of what values mean: a dataclass checks its own ranges
when it is made.

Fields may be of plain types, `Literal`s, `X | None`, tuples (lists in JSON) of one length or of any, dicts by
name, `Any`, and dataclasses again.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

Record = TypeVar("Record")


def read_record(kind: type[Record], document: object, where: str) -> Record:
    """Make a record of a document.

    An integer is taken for a float, but no boolean for a number. A key whose field has a default may be
    missing.

    Args:
        kind: a dataclass.
        document: of parsed JSON.
        where: how errors call the document.

    Raises:
        ValueError: a key too many or missing, or a value of another type. Whoever knows what the document is
            makes an error of the project of it.
    """
    if not isinstance(document, dict):
        raise ValueError(f"{where} is {document!r}, must be an object")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if extra := sorted(set(document) - set(fields)):
        raise ValueError(f"{where} has the unknown key {extra[0]!r}")
    needed = {name for name, field in fields.items() if not _has_default(field)}
    if missing := sorted(needed - set(document)):
        raise ValueError(f"{where} lacks the key {missing[0]!r}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], item, f"{where}.{name}") for name, item in document.items()})


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _value(kind: Any, value: Any, where: str) -> Any:
    """The value of a field, by its annotation."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return read_record(typing.cast("type[Any]", kind), value, where)
    if origin is tuple:
        any_length = inner[-1] is ...
        if not isinstance(value, list | tuple) or not (any_length or len(value) == len(inner)):
            wanted = "a list" if any_length else f"a list of {len(inner)}"
            raise ValueError(f"{where} is {value!r}, must be {wanted}")
        return tuple(_value(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}, must be an object")
        return {key: _value(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (option for option in inner if option is not types.NoneType)
        return _value(kind, value, where)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{where} is {value!r}, must be {' or '.join(map(str, inner))}")
        return value
    return _plain(kind, value, where)


def _plain(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{where} is too large a number") from error
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise ValueError(f"{where} is {value!r}, must be of type {kind.__name__}")
    return value
