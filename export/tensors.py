"""The weights of a checkpoint: names and shapes at once, values in row chunks.

In: a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`. Out: float32 rows of
any tensor, whatever it is stored as. Every header is parsed and checked against the size of its file when the
store opens, so a truncated or mixed-up download is found before anything is written. Knows nothing of models:
which names must be there is `checkpoint.py`'s affair.

The file format is eight bytes with the header's length, the header as JSON, then the tensors without gaps
(https://huggingface.co/docs/safetensors). Files are mapped, never read whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
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

LFS_MAGIC = b"version https://git-lfs"
_BLOCK_VALUES = 1 << 17
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """Place of one tensor: format code, shape, and byte range in its file."""

    file: int
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class _File:
    """One mapped safetensors file."""

    path: Path
    size_bytes: int
    mtime_ns: int
    header: bytes
    view: mmap.mmap = field(repr=False)


class TensorStore:
    """All tensors of one checkpoint folder, mapped read-only. Safe to use from several threads.

    Attributes:
        folder: where the files lie.
        files: names of the safetensors files, in order.
    """

    def __init__(self, folder: Path, files: Sequence[_File], entries: Mapping[str, _Entry]) -> None:
        self.folder = folder
        self.files = tuple(file.path.name for file in files)
        self._files = tuple(files)
        self._entries = dict(entries)

    @classmethod
    def open(cls, folder: Path) -> TensorStore:
        """Find, map and check the safetensors files of a folder.

        Raises:
            CheckpointError: no safetensors files, a shard missing, truncated or damaged, or an index that
                does not agree with its shards.
        """
        paths, weight_map = _find(folder)
        files: list[_File] = []
        entries: dict[str, _Entry] = {}
        for number, path in enumerate(paths):
            file, found = _open_file(path, number)
            files.append(file)
            for name, entry in found.items():
                if name in entries:
                    other = files[entries[name].file].path.name
                    raise CheckpointError(
                        f"{path} and {other} both hold the tensor {name!r}; download the checkpoint again "
                        "into an empty folder"
                    )
                entries[name] = entry
        if weight_map is not None:
            _compare_with_index(folder / INDEX_NAME, weight_map, entries, files)
        return cls(folder, files, entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor name, in file order."""
        return tuple(self._entries)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.end - entry.begin for entry in self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as stored."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Number format of a tensor: bfloat16, float16 or float32; another format by its safetensors code."""
        code = self._entry(name).code
        return FLOATS.get(code, code)

    def rows(
        self, name: str, start: int, stop: int, *, permute: tuple[int, ...] | None = None
    ) -> NDArray[np.float32]:
        """Read rows of a tensor seen as a matrix.

        Args:
            name: tensor name.
            start: first row.
            stop: one past the last row.
            permute: order of the axes before the tensor is seen as (first axis, product of the others).

        Returns:
            A new C-contiguous array (stop - start, columns); nothing else stays resident.

        Raises:
            CheckpointError: unknown name, a format that is no float, rows out of range, or a file that shrank
                since.
        """
        entry = self._entry(name)
        if entry.code not in FLOATS:
            raise CheckpointError(f"the tensor {name!r} is stored as {entry.code}; {_NEED_FLOATS}")
        axes = permute if permute is not None else tuple(range(len(entry.shape)))
        if not entry.shape or sorted(axes) != list(range(len(entry.shape))):
            raise CheckpointError(
                f"the tensor {name!r} of shape {entry.shape} has no rows in axis order {permute}"
            )
        count = entry.shape[axes[0]]
        if not 0 <= start <= stop <= count:
            raise CheckpointError(f"the tensor {name!r} has {count} rows, {start}:{stop} is outside of them")
        columns = math.prod(entry.shape[axis] for axis in axes[1:])
        matrix = self._stored(name, entry)
        if axes[0] == 0:
            wanted = matrix[start:stop]
            if axes != tuple(range(len(axes))):
                wanted = np.ascontiguousarray(wanted.transpose(axes))
            values = _to_float32(wanted.reshape(stop - start, columns))
            row_bytes = (entry.end - entry.begin) // max(count, 1)
            self._drop(entry, entry.begin + start * row_bytes, entry.begin + stop * row_bytes)
            return values
        return _to_float32(
            np.ascontiguousarray(matrix.transpose(axes)[start:stop]).reshape(stop - start, columns)
        )

    def release(self, name: str) -> None:
        """Drop what is still mapped of a tensor from resident memory; it can be read again.

        `rows` has done so for its own rows already, unless `permute` moved the first axis.
        """
        entry = self._entry(name)
        self._drop(entry, entry.begin, entry.end)

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes, modification times and headers of the files."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(os.fsencode(file.path.name) + f"\0{file.size_bytes}\0{file.mtime_ns}\0".encode())
            digest.update(hashlib.sha256(file.header).digest())
        return digest.hexdigest()

    def close(self) -> None:
        """Unmap the files. The store cannot be read afterwards."""
        for file in self._files:
            file.view.close()

    def _drop(self, entry: _Entry, begin: int, end: int) -> None:
        """Drop the pages of a byte range from resident memory; a page that is needed after all comes back."""
        if hasattr(mmap, "MADV_DONTNEED") and begin < end:
            begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._files[entry.file].view.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError as error:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}") from error

    def _stored(self, name: str, entry: _Entry) -> NDArray[Any]:
        """The tensor as it lies in the file; bfloat16 as uint16."""
        file = self._files[entry.file]
        try:
            size = file.path.stat().st_size  # reading past the end of a mapped file would kill the process
        except OSError as error:
            raise CheckpointError(f"{file.path} went away while it was read ({error.strerror})") from error
        if size != file.size_bytes:
            raise CheckpointError(
                f"{file.path} changed from {file.size_bytes} to {size} bytes while {name!r} was read; start "
                "again"
            )
        kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[entry.code]
        if file.view.closed:
            raise CheckpointError(f"{file.path} was closed before {name!r} was read")
        if entry.begin == entry.end:
            return np.empty(entry.shape, dtype=kind)
        flat = np.frombuffer(file.view, dtype=kind, count=math.prod(entry.shape), offset=entry.begin)
        return flat.reshape(entry.shape)


_NEED_FLOATS = (
    "an export needs the original bfloat16, float16 or float32 weights, not an already quantized checkpoint"
)


def _to_float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Copy contiguous values to float32; uint16 holds the upper halves of float32 numbers (bfloat16)."""
    if stored.dtype.kind == "f":
        return stored.astype(np.float32, order="C", copy=True)
    out = np.empty(stored.shape, dtype=np.uint32)
    source, target = stored.reshape(-1), out.reshape(-1)
    for begin in range(
        0, source.size, _BLOCK_VALUES
    ):  # a block stays in the processor's cache between the passes
        block = target[begin : begin + _BLOCK_VALUES]
        block[...] = source[begin : begin + _BLOCK_VALUES]
        block <<= 16
    return out.view(np.float32)


def _find(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder, and the index where there is one."""
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.exists():
        if index.exists():
            _log.warning("%s holds %s and %s; reading the former", folder, SINGLE_NAME, INDEX_NAME)
        return [single], None
    if index.exists():
        return _read_index(index)
    raise CheckpointError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    """What to say of a folder without an entry point to safetensors weights."""
    names = sorted(path.name for path in folder.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in shards):
        return f"{folder} holds shards ({shards[0]}, ...) but not {INDEX_NAME}; download that file too"
    if "adapter_model.safetensors" in names or "adapter_config.json" in names:
        return f"{folder} holds an adapter (LoRA), not a model; merge it into its base model first"
    if shards:
        return (
            f"{folder} holds {shards[0]} but neither {SINGLE_NAME} nor {INDEX_NAME}; rename it if it is the "
            "whole model"
        )
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        return (
            f"{folder} holds {gguf[0]}, a GGUF file, which is already converted and quantized; give the "
            "original safetensors checkpoint"
        )
    if old := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"{folder} holds pickled weights ({old[0]}) and no safetensors, and pickles are not read because "
            "they can run code; download the safetensors files, or save the model again with save_pretrained"
        )
    if "manifest.json" in names and any(name.endswith(".onnx") for name in names):
        return (
            f"{folder} is an exported bundle, not a checkpoint; run it, or give the checkpoint it was made "
            "from"
        )
    return f"{folder} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there"


def _read_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    document = read_json(path)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{path} has no "weight_map" with tensor names; download it again')
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{path} puts the tensor {name!r} into {file!r}, which is not a file name in its folder"
            )
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of the {len(files)} weight files that {path.name} names, "
            f"first {missing[0]}; download the missing files"
        )
    return [path.parent / file for file in files], weight_map


def _compare_with_index(
    index: Path, weight_map: Mapping[str, str], entries: Mapping[str, _Entry], files: Sequence[_File]
) -> None:
    for name, file in weight_map.items():
        entry = entries.get(name)
        if entry is None or files[entry.file].path.name != file:
            where = "no file has it" if entry is None else f"it lies in {files[entry.file].path.name}"
            raise CheckpointError(
                f"{index} puts the tensor {name!r} into {file}, but {where}; index and shards are of "
                "different downloads"
            )
    for name, entry in entries.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{files[entry.file].path} holds the tensor {name!r}, which {index.name} does not list; "
                "index and shards are of different downloads"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of the checkpoint.

    Raises:
        CheckpointError: unreadable, not UTF-8, not JSON, not an object, or a git-lfs pointer.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if data.startswith(LFS_MAGIC):
        raise CheckpointError(lfs_message(path))
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(document).__name__}, must be an object; download it again"
        )
    return document


def lfs_message(path: Path) -> str:
    """What to say of a file that git-lfs has not filled."""
    return (
        f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or download "
        "with `hf download`"
    )


def _open_file(path: Path, number: int) -> tuple[_File, dict[str, _Entry]]:
    """Map one safetensors file and check its header."""
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
    file = _File(path, stat.st_size, stat.st_mtime_ns, header, view)
    return file, dict(_entries(path, number, header, stat.st_size))


def _entries(path: Path, number: int, header: bytes, file_bytes: int) -> Iterator[tuple[str, _Entry]]:
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


def _entry_of(path: Path, number: int, name: str, item: object, base: int) -> _Entry:
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= set(item):
        raise CheckpointError(
            f"{path} is damaged: the header of {name!r} lacks dtype, shape or offsets; download it again"
        )
    code, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(code, str) or code not in ITEM_BYTES:
        raise CheckpointError(
            f"{path} stores the tensor {name!r} as {code!r}, an unknown number format; {_NEED_FLOATS}"
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
    return _Entry(number, code, tuple(shape), base + begin, base + end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
