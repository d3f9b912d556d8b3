"""Memory and CPU time that this process may have, and memory that it has.

In: Linux' control groups (both versions) and /proc. Out: numbers, None where the system tells none or sets no
limit. Knows nothing of what the memory is for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED_BYTES = 1 << 60
"""Version 1 writes "no limit" as a number near 2 ** 63."""


@dataclass(frozen=True)
class Limits:
    """The tightest limits of the control groups that this process is in.

    Attributes:
        cpus: CPUs' worth of time, None without a quota.
        free_bytes: what may still be taken, clean file pages counted as free; None without a limit.
    """

    cpus: float | None
    free_bytes: int | None


def limits(root: Path = Path("/")) -> Limits:
    """Read the limits of this process.

    Args:
        root: where /sys and /proc lie; another one in tests.
    """
    cpus: list[float] = []
    free: list[int] = []
    for folder, legacy in _groups(root):
        quota = _quota_v1(folder) if legacy else _quota_v2(folder)
        room = _room(folder, legacy)
        cpus += [] if quota is None else [quota]
        free += [] if room is None else [room]
    return Limits(min(cpus, default=None), min(free, default=None))


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can be taken without swapping: the system's estimate, within the control group's limit."""
    known = [_kib(root / "proc/meminfo", "MemAvailable"), limits(root).free_bytes]
    return min((value for value in known if value is not None), default=None)


def anonymous_bytes(root: Path = Path("/")) -> int | None:
    """Anonymous memory of this process: what cannot be dropped and read again from a file."""
    return _kib(root / "proc/self/status", "RssAnon")


def trim_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it and can (glibc)."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    trim(ctypes.c_size_t(0))


def _groups(root: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the groups of this process and of all above; True with those of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mounts = (
            [""]
            if not controllers
            else [name for name in ("cpu", "memory") if name in controllers.split(",")]
        )
        for mount in mounts:
            top = root / "sys/fs/cgroup" / mount
            folder = top / path.lstrip("/")
            while folder.is_relative_to(top):  # a container may see its own group as the top
                yield folder, bool(mount)
                folder = folder.parent


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    try:
        return int(quota) / int(period) if int(quota) > 0 else None  # "max" and -1 are no quota
    except (ValueError, ZeroDivisionError):
        return None


def _room(folder: Path, legacy: bool) -> int | None:
    """What a group leaves: its limit less what it uses, file pages not counted as used."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if legacy else ("memory.max", "memory.current")
    try:
        limit, used = (int(_text(folder / name)) for name in names)
    except ValueError:
        return None
    if limit >= UNLIMITED_BYTES:
        return None
    statistics = dict(
        line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line
    )
    try:
        prefix = "total_" if legacy else ""
        cached = sum(int(statistics.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))
    except ValueError:
        cached = 0
    return max(0, limit - max(0, used - cached))


def _kib(path: Path, name: str) -> int | None:
    """The value of a line like "MemAvailable:   123 kB", in bytes."""
    for line in _text(path).splitlines():
        if line.startswith(f"{name}:"):
            try:
                return int(line.split()[1]) * 1024
            except (IndexError, ValueError):
                return None
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
