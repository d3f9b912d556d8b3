"""One safetensors file: mapped, its header parsed and compared with its size.

In: a path. Out: the mapping, and the place of every tensor in it; a truncated or damaged file is an error
here, before any value is read. Knows nothing of the other files of a checkpoint.

The file format is eight bytes with the header's length, the header as JSON, then the tensors without gaps
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from autoglm_edge.errors import CheckpointError
from autoglm_edge.export.files import LFS_MAGIC, lfs_message

MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library sets as well."""

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Number formats of safetensors headers whose items are whole bytes."""
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Formats that `rows` reads, with their common names."""
NEED_FLOATS = (
    "an export needs the original bfloat16, float16 or float32 weights, not an already quantized checkpoint"
)


@dataclass(frozen=True)
class Entry:
    """Place of one tensor: format code, shape, and byte range in its file."""

    file: int
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class MappedFile:
    """One mapped safetensors file."""

    path: Path
    size_bytes: int
    mtime_ns: int
    header: bytes
    view: mmap.mmap = field(repr=False)


def open_file(path: Path, number: int) -> tuple[MappedFile, dict[str, Entry]]:
    """Map one safetensors file and check its header.

    Args:
        path: the file.
        number: of the file, which its entries then carry.

    Raises:
        CheckpointError: unreadable, foreign, truncated or damaged.
    """
    try:
        with path.open("rb") as stream:
            stat = path.stat()
            start = stream.read(max(8, len(LFS_MAGIC)))
            if start.startswith(LFS_MAGIC):
                raise CheckpointError(lfs_message(path))
            if len(start) < 8:
                raise CheckpointError(f"{path} has only {stat.st_size} bytes; download it again")
            length = int.from_bytes(start[:8], "little")
            if length > MAX_HEADER_BYTES or (start[8:9] and start[8:9] != b"{"):
                raise CheckpointError(
                    f"{path} is not a safetensors file (it starts with {start[:8]!r}); download it again"
                )
            if 8 + length > stat.st_size:
                raise CheckpointError(
                    f"{path} is truncated: its header alone takes {8 + length} bytes, the file has "
                    f"{stat.st_size}; download it again"
                )
            stream.seek(8)
            header = stream.read(length)
            view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    file = MappedFile(path, stat.st_size, stat.st_mtime_ns, header, view)
    return file, dict(_entries(path, number, header, stat.st_size))


def _entries(path: Path, number: int, header: bytes, file_bytes: int) -> Iterator[tuple[str, Entry]]:
    """Parse and check a header: known formats, sizes as of the shapes, no gap, overlap or truncation."""
    base = 8 + len(header)
    parsed = [(name, _entry_of(path, number, name, item, base)) for name, item in _parse_header(path, header)]
    end = base
    for name, entry in sorted(parsed, key=lambda pair: (pair[1].begin, pair[1].end)):
        if entry.begin != end:
            kind = "overlaps the one before" if entry.begin < end else "leaves a gap before itself"
            raise CheckpointError(f"{path} is damaged: the tensor {name!r} {kind}; download it again")
        end = entry.end
    if end > file_bytes:
        raise CheckpointError(
            f"{path} is truncated: its tensors need {end} bytes, the file has {file_bytes}; download it again"
        )
    if end < file_bytes:
        raise CheckpointError(
            f"{path} is damaged: {file_bytes - end} bytes follow its last tensor; download it again"
        )
    yield from parsed


def _parse_header(path: Path, header: bytes) -> list[tuple[str, object]]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        document = dict(pairs)
        if len(document) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path} is damaged: its header names {twice!r} twice; download it again")
        return document

    try:
        document = json.loads(header, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: its header is not valid JSON ({error}); download it again"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is damaged: its header is not a JSON object; download it again")
    document.pop("__metadata__", None)
    return list(document.items())


def _entry_of(path: Path, number: int, name: str, item: object, base: int) -> Entry:
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= set(item):
        raise CheckpointError(
            f"{path} is damaged: the header of {name!r} lacks dtype, shape or offsets; download it again"
        )
    code, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(code, str) or code not in ITEM_BYTES:
        raise CheckpointError(
            f"{path} stores the tensor {name!r} as {code!r}, an unknown number format; {NEED_FLOATS}"
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path} is damaged: {name!r} has the shape {shape!r} and offsets {offsets!r}; download it again"
        )
    begin, end = offsets
    size = math.prod(shape) * ITEM_BYTES[code]
    if end - begin != size:
        raise CheckpointError(
            f"{path} is damaged: {name!r} of shape {tuple(shape)} needs {size} bytes, its offsets give "
            f"{end - begin}; download it again"
        )
    return Entry(number, code, tuple(shape), base + begin, base + end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
