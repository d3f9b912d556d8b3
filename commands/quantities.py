"""Numbers as people write and read them: bytes with a unit, lists of integers.

In: text of the command line, or a count. Out: integers, or text.
"""

from __future__ import annotations

import re

import click

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES = re.compile(r"(\d{1,15})\s*([kmgt]?)b?", re.IGNORECASE)


def format_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and model pages count: 512 B, 3.6 MB, 5.86 GB."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} B"


def read_bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Bytes, as a number or with a unit: 500000, 500kB, 2GB.

    Raises:
        click.BadParameter: something else.
    """
    if value is None:
        return None
    found = _BYTES.fullmatch(value.strip())
    if found is None:
        raise click.BadParameter(f"{value!r} is no number of bytes such as 500MB")
    return int(found[1]) * _UNITS[found[2].lower()]


def read_integers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Integers with commas between them; an empty text is an empty list.

    Raises:
        click.BadParameter: something else.
    """
    if value is None:
        return None
    try:
        return tuple(int(item) for item in value.split(",")) if value.strip() else ()
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of integers such as 128,512") from error
