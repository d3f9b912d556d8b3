"""The counters that the system keeps for a group: memory by kind, refaults, kills, pressure, processor time.

In: folders of groups, either version. Out: numbers, None where a file is not there. Files stay open and are
read again from their beginning, which costs a few microseconds each. Sets nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
UNLIMITED_BYTES = 1 << 60
"""Version 1 writes "no limit" as a number near 2 ** 63."""
NEAR_BYTES = 2 << 20
"""Memory is charged in batches, and as huge pages, so that a group ends a little below its limit."""
_READ_BYTES = 1 << 14
_V1_STAT = re.compile(rb"^total_(rss|shmem|swap|workingset_refault_file) (\d+)$", re.MULTILINE)
"""rss counts huge pages, too; the total_ ones count groups that the child may make below its own."""
_V2_STAT = re.compile(rb"^(anon|shmem|workingset_refault_file) (\d+)$", re.MULTILINE)
_PRESSURE = re.compile(rb"^(some|full) .*total=(\d+)$", re.MULTILINE)
_CPU = re.compile(rb"usage_usec (\d+)")


class OpenFile:
    """A small file of the system, opened once."""

    def __init__(self, path: Path) -> None:
        """Open it; one that is not there reads as empty."""
        try:
            self._descriptor: int | None = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            self._descriptor = None

    def read(self) -> bytes:
        """All of it, up to 16 KiB; empty if what it told of is gone."""
        if self._descriptor is None:
            return b""
        try:
            return os.pread(self._descriptor, _READ_BYTES, 0)
        except OSError:
            return b""

    def number(self) -> int | None:
        """Its only number."""
        text = self.read().strip()
        return int(text) if text.isdigit() else None

    def values(self) -> dict[bytes, int]:
        """Its lines of the form "name number"."""
        found = {}
        for line in self.read().splitlines():
            name, _, value = line.partition(b" ")
            if value.isdigit():
                found[name] = int(value)
        return found

    def close(self) -> None:
        """Close it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@dataclass(frozen=True)
class GroupMemory:
    """Memory of a group at one moment, in bytes.

    Attributes:
        anon_bytes: anonymous.
        shmem_bytes: shared.
        swap_bytes: swapped out.
        refaulted_bytes: file pages read again, since the group was made.
    """

    anon_bytes: int
    shmem_bytes: int
    swap_bytes: int
    refaulted_bytes: int | None


class GroupCounters:
    """What can be read of one run's groups."""

    def __init__(self, memory: Path | None, *, legacy: bool = False, pressure: Path | None = None) -> None:
        """Open the files.

        Args:
            memory: folder that the memory controller counts in; None without one.
            legacy: that folder is of version 1.
            pressure: folder of the unified tree, for stalls and processor time.
        """
        self._legacy = legacy
        self.folder = memory or pressure
        names = ("memory.usage_in_bytes", "") if legacy else ("memory.current", "memory.swap.current")
        self._stat, self._charged, self._swap, self._pressure, self._cpu = (
            OpenFile(folder / name if folder and name else Path("/nonexistent"))
            for folder, name in (
                (memory, "memory.stat"),
                (memory, names[0]),
                (memory, names[1]),
                (pressure, "memory.pressure"),
                (pressure, "cpu.stat"),
            )
        )
        self._memory = memory
        self._kills_before = self._kills()

    def memory(self) -> GroupMemory | None:
        """Memory by kind; None without the controller."""
        text = self._stat.read()
        if not text:
            return None
        if self._legacy:
            found = dict(_V1_STAT.findall(text))
            anon, shmem, swap = (found.get(name, 0) for name in (b"rss", b"shmem", b"swap"))
        else:
            found = dict(_V2_STAT.findall(text))
            anon, shmem, swap = found.get(b"anon", 0), found.get(b"shmem", 0), self._swap.number() or 0
        refaulted = found.get(b"workingset_refault_file")
        again = None if refaulted is None else int(refaulted) * PAGE_BYTES
        return GroupMemory(int(anon), int(shmem), int(swap), again)

    def charged_bytes(self) -> int | None:
        """All that counts against the limit."""
        return self._charged.number()

    def stalls_s(self) -> tuple[float | None, float | None]:
        """Seconds in which some, and in which all tasks waited for memory, since the group was made."""
        found = {kind: int(total) / 1e6 for kind, total in _PRESSURE.findall(self._pressure.read())}
        return found.get(b"some"), found.get(b"full")

    def cpu_s(self) -> float | None:
        """Seconds of processor time since the group was made."""
        used = _CPU.match(self._cpu.read())
        return None if used is None else int(used[1]) / 1e6

    def peak_bytes(self) -> int | None:
        """The most that was ever charged."""
        name = "memory.max_usage_in_bytes" if self._legacy else "memory.peak"
        return _number(self._memory, name)

    def oom_kills(self) -> int:
        """Processes of the group that the kernel killed for want of memory."""
        return max(0, self._kills() - self._kills_before)

    def hit_limit(self) -> bool:
        """Whether the group was ever refused memory for its own limit."""
        if self._memory is None:
            return False
        if self._legacy:  # recent kernels no longer count in failcnt, but keep the high-water mark
            return any(
                (_number(self._memory, f"memory.{kind}failcnt") or 0) > 0
                or (_number(self._memory, f"memory.{kind}max_usage_in_bytes") or 0)
                >= (_number(self._memory, f"memory.{kind}limit_in_bytes") or UNLIMITED_BYTES) - NEAR_BYTES
                for kind in ("", "memsw.")
            )
        events = _values(self._memory / "memory.events")
        return any(events.get(name, 0) > 0 for name in (b"max", b"oom"))

    def close(self) -> None:
        """Close the files."""
        for file in (self._stat, self._charged, self._swap, self._pressure, self._cpu):
            file.close()

    def _kills(self) -> int:
        if self._memory is None:
            return 0
        name = "memory.oom_control" if self._legacy else "memory.events"
        return _values(self._memory / name).get(b"oom_kill", 0)


def _number(folder: Path | None, name: str) -> int | None:
    if folder is None:
        return None
    file = OpenFile(folder / name)
    try:
        return file.number()
    finally:
        file.close()


def _values(path: Path) -> dict[bytes, int]:
    file = OpenFile(path)
    try:
        return file.values()
    finally:
        file.close()
