"""Drops files from the page cache, and says what stays there.

In: files. Out: bytes in the cache before and after. A page of a file counts for the group that touched it
first: a model that somebody else has read before would cost the child nothing, and everything would seem to
fit.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from autoglm_edge.errors import SimulationError

from .counters import PAGE_BYTES

_SYS_CACHESTAT = 451
"""The same number on every architecture; since Linux 6.5."""


@dataclass(frozen=True)
class Dropped:
    """What became of some files.

    Attributes:
        files: how many.
        total_bytes: their size.
        before_bytes: in the cache before; None if the system does not tell.
        after_bytes: in the cache after: pages that another process has mapped, or locked.
    """

    files: int
    total_bytes: int
    before_bytes: int | None
    after_bytes: int | None

    @property
    def note(self) -> str:
        """What a report should say about it, a sentence; "" if all is as it should be."""
        if self.after_bytes is None:
            return (
                "whether the model left the page cache is not known here; pages read before cost it nothing"
            )
        if self.after_bytes > self.total_bytes // 100:
            return (
                f"{self.after_bytes >> 20} MiB of the model stay in the page cache, where another process "
                "holds them; they cost the child nothing"
            )
        return ""


def drop_files(paths: Iterable[Path]) -> Dropped:
    """Write files back and drop them from the page cache; on a system that cannot, only count them.

    Args:
        paths: plain files; folders stand for the files in them.

    Raises:
        SimulationError: a file cannot be opened.
    """
    count = total = 0
    before: int | None = 0
    after: int | None = 0
    for path in _files(paths):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SimulationError(
                f"{path} cannot be read ({error.strerror or error}), so it cannot be dropped from "
                "the page cache"
            ) from error
        try:
            size = os.fstat(descriptor).st_size
            was = cached_bytes(descriptor, size)
            _drop(descriptor)
            left = cached_bytes(descriptor, size)
        finally:
            os.close(descriptor)
        count, total = count + 1, total + size
        before = None if before is None or was is None else before + was
        after = None if after is None or left is None else after + left
    return Dropped(count, total, before, after)


def cached_bytes(descriptor: int, size: int) -> int | None:
    """Bytes of an open file that are in the page cache; None if the system does not tell."""
    if size == 0:
        return 0
    owner = os.fstat(descriptor).st_uid
    if hasattr(os, "geteuid") and os.geteuid() not in (0, owner):
        return None  # of other people's files the system tells nothing, and mincore that all is there
    pages = _cachestat(descriptor)
    return _mincore(descriptor, size) if pages is None else pages * PAGE_BYTES


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file())
        else:
            yield path


def _drop(descriptor: int) -> None:
    """Pages that wait to be written cannot be dropped, so they are written first."""
    with contextlib.suppress(OSError):  # a file system that only reads has nothing to write
        os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _cachestat(descriptor: int) -> int | None:
    """Pages in the cache, by the system call made for that; None where there is none."""

    class Range(ctypes.Structure):
        _fields_ = (("start", ctypes.c_uint64), ("length", ctypes.c_uint64))

    class Pages(ctypes.Structure):
        _fields_ = tuple(
            (name, ctypes.c_uint64)
            for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
        )

    try:
        call = ctypes.CDLL(None, use_errno=True).syscall
    except (AttributeError, OSError, TypeError):  # Windows
        return None
    if not hasattr(os, "posix_fadvise"):  # macOS has other numbers
        return None
    whole, pages = Range(0, 0), Pages()
    if call(_SYS_CACHESTAT, descriptor, ctypes.byref(whole), ctypes.byref(pages), 0) != 0:
        return None
    return int(pages.cached)


def _mincore(descriptor: int, size: int) -> int | None:
    """The same by mapping the file; it touches no page."""
    if not hasattr(mmap, "PROT_READ"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    try:
        states = (ctypes.c_ubyte * ((size + PAGE_BYTES - 1) // PAGE_BYTES))()
        if library.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states) != 0:
            return None
        return PAGE_BYTES * sum(value & 1 for value in bytes(states))
    finally:
        library.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
