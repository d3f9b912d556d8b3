"""How much the system reads ahead from the disk that holds the model: a phone reads far less than a server.

In: a file. Out: the setting of its device, changed for a run and put back, or only noted. It is a setting of
the whole device: others notice it, and so only one run at a time changes it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from autoglm_edge.errors import SimulationError

from .journal import Journal

KIND = "readahead"


class ReadAhead:
    """The setting of one device, from `of` to `restore`."""

    def __init__(self, file: Path, journal: Journal, root: Path = Path("/")) -> None:
        """Find the device of a file."""
        self._journal = journal
        self._setting = _setting(file, root)
        self._before: int | None = None
        self._lock: IO[bytes] | None = None

    @property
    def bytes(self) -> int | None:
        """Now; None if the system does not tell."""
        return None if self._setting is None else _read(self._setting)

    def set(self, size_bytes: int) -> str:
        """Change it, where this user may.

        Returns:
            A note for the report, a sentence; "" if it is as asked.
        """
        now = self.bytes
        if self._setting is None or now is None:
            return "how far this disk reads ahead is not known"
        if now == size_bytes:
            return ""
        told = f"this disk reads {now >> 10} KiB ahead, the device {size_bytes >> 10} KiB"
        if not os.access(self._setting, os.W_OK):
            return f"{told}: re-read bytes and stalls are those of this disk"
        if not self._take_lock():
            return f"{told}, and another run has the setting: re-read bytes and stalls are those of this disk"
        self._journal.add(KIND, path=str(self._setting), kib=now >> 10)
        self._before = now
        try:
            self._setting.write_text(str(max(1, size_bytes >> 10)))
        except OSError as error:
            self.restore()
            return f"{told}, and refuses to change that ({error.strerror or error})"
        return ""

    def restore(self) -> None:
        """Put back what it was.

        Raises:
            SimulationError: the system refuses; it stays in the journal.
        """
        if self._before is not None and self._setting is not None:
            _write(self._setting, self._before >> 10)
            self._journal.strike(KIND, path=str(self._setting), kib=self._before >> 10)
            self._before = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> bool:
        """One run at a time; the lock ends with this process."""
        if sys.platform == "win32":
            return False
        import fcntl

        if self._setting is None:
            return False
        try:
            self._lock = self._setting.open("rb")  # held by all runs of all users
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if self._lock is not None:
                self._lock.close()
                self._lock = None
            return False
        return True


def undo_readahead(entry: Mapping[str, Any], root: Path = Path("/")) -> None:
    """Put back what a journal says that it was.

    Raises:
        SimulationError: the system refuses.
    """
    path, kib = Path(str(entry.get("path", ""))), entry.get("kib")
    devices = root / "sys/class/bdi"
    plain = path.name == "read_ahead_kb" and path.parent.parent == devices
    if plain and isinstance(kib, int) and not isinstance(kib, bool) and kib >= 0 and path.exists():
        _write(path, kib)


def _setting(file: Path, root: Path) -> Path | None:
    """The file in which the device of another file has its read-ahead, in KiB."""
    try:
        device = file.stat().st_dev
    except OSError:
        return None
    if not hasattr(os, "major"):
        return None
    path = root / f"sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    return path if path.exists() else None


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text()) << 10
    except (OSError, ValueError):
        return None


def _write(path: Path, kib: int) -> None:
    try:
        path.write_text(str(kib))
    except OSError as error:
        raise SimulationError(
            f"{path} cannot be set back to {kib} ({error.strerror or error}); write it there as root"
        ) from error
