"""Blocks of keys and values as files of a folder, bounded in bytes, the least recently used deleted first.

In: names (SHA-256 of what a block stands for) and rows (L, 2, K, n, D). Out: rows, or None. Knows nothing of
tokens. Several processes may share a folder.

A file is named by its block and is: 8 bytes of magic, the length of the header as 4 bytes little-endian, the
header (JSON: bundle, dtype, shape, name, SHA-256 of the payload), the payload. It is written under another
name and renamed. What is read is compared with what must be there, byte for byte of the header and by hash of
the payload: a file that is cut short, damaged, of another bundle, dtype or geometry is deleted and counts as
not there. It holds what a model made of a conversation, so only the user may read the folder and its files.

A disk that is full or read-only ends the writing, not the answer: a warning is logged once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)

MAGIC = b"AGLMKV1\n"
SUFFIX = ".kv"
_TEMPORARY = ".part"
_OURS = re.compile(r"[0-9a-f]{64}\.kv(\.[0-9a-f]{16}\.part)?")
_HEADER_BYTES = 512
"""More than what stands before the payload."""
_STALE_S = 3600.0
"""Age from which an unfinished file is what a killed process left."""


class BlockFolder:
    """Files of one bundle's blocks; other bundles' files in the folder count for its size and its order."""

    def __init__(
        self, folder: Path, limit_bytes: int, *, bundle: str, dtype: np.dtype[Any], row_shape: tuple[int, ...]
    ) -> None:
        """Make the folder if it is not there, and bring it within its limit.

        Args:
            folder: any; only files of this module's names are ever touched.
            limit_bytes: of all files together.
            bundle: fingerprint.
            dtype: of rows.
            row_shape: (L, 2, K, 0, D).
        """
        self._folder = folder
        self._limit = limit_bytes
        self._bundle = bundle
        self._dtype = dtype
        self._row_shape = row_shape
        self._used = 0
        self._writes = True
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(0)
        except OSError as error:
            self._stop_writing(error)

    @property
    def writes(self) -> bool:
        """Whether blocks are still written."""
        return self._writes

    def takes(self, files: int, tokens: int) -> bool:
        """Whether a sequence of so many tokens in so many files is written without displacing itself."""
        row_bytes = self._dtype.itemsize * math.prod(self._shape(1))
        return self._writes and files * _HEADER_BYTES + tokens * row_bytes <= self._limit

    def has(self, name: bytes) -> bool:
        """Whether there is a file of that name; whether it is sound turns out when it is read."""
        try:
            return self._path(name).is_file()
        except OSError:
            return False

    def read(self, name: bytes, tokens: int) -> NDArray[Any] | None:
        """Rows (L, 2, K, tokens, D) of a block, or None; a file that is not sound is deleted."""
        shape = self._shape(tokens)
        path = self._path(name)
        try:
            # Neither a link nor a pipe of that name is followed or waited for.
            flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            flags |= getattr(os, "O_BINARY", 0)
            with open(os.open(path, flags), "rb", buffering=0) as file:
                rows = self._read(file, name, shape)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("the saved prompt %s cannot be read (%s); it is left out", path, error)
            return None
        if rows is None:
            _log.warning("the saved prompt %s is damaged or of something else; it is deleted", path)
            with suppress(OSError):
                path.unlink()
        return rows

    def write(self, name: bytes, rows: NDArray[Any]) -> None:
        """Keep a block; nothing happens where the disk does not take it or it is larger than the limit."""
        if not self._writes:
            return
        rows = np.ascontiguousarray(rows)
        payload = rows.reshape(-1).view(np.uint8)
        header = self._header(name, rows.shape, hashlib.sha256(payload.data).hexdigest())
        head = MAGIC + len(header).to_bytes(4, "little") + header
        size = len(head) + payload.nbytes
        if size > self._limit:
            return
        path = self._path(name)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_TEMPORARY}")
        try:
            self._make_room(size)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(head)
                file.write(payload.data)
            temporary.replace(path)
            self._used += size
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            self._stop_writing(error)

    def touch(self, names: Sequence[bytes]) -> None:
        """Make files the most recently used, the last named before all."""
        now = time.time_ns()
        for index, name in enumerate(names):
            with suppress(OSError):  # deleted meanwhile, or a folder that may only be read
                os.utime(self._path(name), ns=(now + index, now + index))

    def _read(self, file: Any, name: bytes, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """The checked rows of an open file, or None."""
        status = os.fstat(file.fileno())
        expected = self._header(name, shape, "0" * 64)
        head_bytes = len(MAGIC) + 4 + len(expected)
        rows = np.empty(shape, self._dtype)
        if not stat.S_ISREG(status.st_mode) or status.st_size != head_bytes + rows.nbytes:
            return None
        head = _read_into(file, bytearray(head_bytes))
        payload = rows.reshape(-1).view(np.uint8)
        if _read_into(file, payload.data) is None or head is None:
            return None
        found = hashlib.sha256(payload.data).hexdigest()
        header = self._header(name, shape, found)
        return rows if bytes(head) == MAGIC + len(header).to_bytes(4, "little") + header else None

    def _header(self, name: bytes, shape: tuple[int, ...], sha256: str) -> bytes:
        document = {
            "bundle": self._bundle,
            "dtype": self._dtype.str,
            "shape": list(shape),
            "name": name.hex(),
            "sha256": sha256,
        }
        return json.dumps(document).encode()

    def _shape(self, tokens: int) -> tuple[int, ...]:
        return (*self._row_shape[:3], tokens, *self._row_shape[4:])

    def _path(self, name: bytes) -> Path:
        return self._folder / f"{name.hex()}{SUFFIX}"

    def _make_room(self, size: int) -> None:
        """Delete what was not used for longest until `size` more bytes fit.

        Sizes are read again only when the limit seems reached: other processes write here, too.
        """
        if size and self._used + size <= self._limit:
            return
        files: list[tuple[int, int, str]] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not _OURS.fullmatch(entry.name):
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    if not entry.name.endswith(_TEMPORARY):
                        files.append((status.st_mtime_ns, status.st_size, entry.path))
                    elif time.time() - status.st_mtime > _STALE_S:
                        os.unlink(entry.path)
        self._used = sum(bytes_ for _, bytes_, _ in files)
        for _, bytes_, path in sorted(files):
            if self._used + size <= self._limit:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._used -= bytes_

    def _stop_writing(self, error: OSError) -> None:
        self._writes = False
        _log.warning(
            "prompts are no longer saved in %s (%s); answers go on without",
            self._folder,
            error.strerror or error,
        )


def _read_into(file: Any, buffer: Any) -> Any | None:
    """Fill a buffer from a file; None if the file is shorter."""
    view = memoryview(buffer)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            return None
        done += count
    return buffer
