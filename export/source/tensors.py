"""The weights of a checkpoint: names and shapes at once, values in row chunks.

In: a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`. Out: float32 rows of
any tensor, whatever it is stored as. Every header is parsed and checked against the size of its file when the
store opens, so a truncated or mixed-up download is found before anything is written. Knows nothing of models:
which names must be there is `checkpoint.py`'s affair.

Files are mapped, never read whole.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import CheckpointError

from .header import FLOATS, NEED_FLOATS, Entry, MappedFile, open_file
from .shards import INDEX_NAME, SINGLE_NAME, compare_with_index, find

__all__ = ["FLOATS", "INDEX_NAME", "SINGLE_NAME", "TensorStore"]

_BLOCK_VALUES = 1 << 17


class TensorStore:
    """All tensors of one checkpoint folder, mapped read-only. Safe to use from several threads.

    Attributes:
        folder: where the files lie.
        files: names of the safetensors files, in order.
    """

    def __init__(self, folder: Path, files: Sequence[MappedFile], entries: Mapping[str, Entry]) -> None:
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
        paths, weight_map = find(folder)
        files: list[MappedFile] = []
        entries: dict[str, Entry] = {}
        for number, path in enumerate(paths):
            file, found = open_file(path, number)
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
            compare_with_index(folder / INDEX_NAME, weight_map, entries, files)
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
            raise CheckpointError(f"the tensor {name!r} is stored as {entry.code}; {NEED_FLOATS}")
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

    def _drop(self, entry: Entry, begin: int, end: int) -> None:
        """Drop the pages of a byte range from resident memory; a page that is needed after all comes back."""
        if hasattr(mmap, "MADV_DONTNEED") and begin < end:
            begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._files[entry.file].view.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError as error:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}") from error

    def _stored(self, name: str, entry: Entry) -> NDArray[Any]:
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
