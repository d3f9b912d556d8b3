"""A control group of our own: made, written to, emptied and removed.

In: a parent folder. Out: a `Group`, whose name says which process made it. The journal hears of it before it
is there and after it is gone. Removing kills what is still inside, children of children too: a group that
holds a process cannot be removed.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autoglm_edge.errors import SimulationError

from .journal import Journal, is_alive

PREFIX = "autoglm-sim-"
KIND = "group"
PATIENCE_S = 10.0
"""How long killed processes may take: one that waits for storage goes when its read is through."""
_PAUSE_S = 0.005
_log = logging.getLogger(__name__)


class Group:
    """A group that exists from `make` to `remove`."""

    def __init__(self, path: Path, journal: Journal) -> None:
        """Take over a folder; `make` is the way in."""
        self.path = path
        self._journal = journal

    @classmethod
    def make(cls, parent: Path, journal: Journal) -> Group:
        """Make a group below another one.

        Raises:
            SimulationError: the system refuses.
        """
        path = parent / f"{PREFIX}{journal.name}"
        journal.add(KIND, path=str(path))
        try:
            path.mkdir()
        except OSError as error:
            journal.strike(KIND, path=str(path))
            raise SimulationError(
                f"the control group {path} cannot be made ({error.strerror or error}); run as root, have the "
                "folder delegated to this user, or choose another enforcement"
            ) from error
        return cls(path, journal)

    def write(self, name: str, value: int | str) -> None:
        """Set one of its files.

        Raises:
            SimulationError: the system refuses the value.
        """
        try:
            (self.path / name).write_text(f"{value}\n")
        except OSError as error:
            raise SimulationError(
                f"{self.path / name} cannot be set to {value} ({error.strerror or error}); choose another "
                "enforcement"
            ) from error

    def read(self, name: str) -> str:
        """One of its files; "" if it is not there."""
        try:
            return (self.path / name).read_text().strip()
        except OSError:
            return ""

    def has(self, name: str) -> bool:
        """Whether the system offers a file for this group."""
        return (self.path / name).exists()

    def remove(self) -> None:
        """Kill what is inside and remove it.

        Raises:
            SimulationError: it cannot be removed; it stays in the journal.
        """
        remove_group(self.path)
        self._journal.strike(KIND, path=str(self.path))


def members(path: Path) -> list[int]:
    """Processes in a group; none if it is gone."""
    try:
        return [int(line) for line in (path / "cgroup.procs").read_text().split() if line.isdigit()]
    except OSError:
        return []


def kill_members(path: Path) -> None:
    """Kill all processes in a group and wait until it is empty, or until patience is at its end."""
    own, until = os.getpid(), time.monotonic() + PATIENCE_S
    while inside := [pid for pid in members(path) if pid not in (0, own)]:
        for pid in inside:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        if time.monotonic() > until:
            return
        time.sleep(_PAUSE_S)


def remove_group(path: Path) -> None:
    """Remove a group of ours with all that is in it; nothing happens if it is gone.

    Raises:
        SimulationError: it is none of ours, or cannot be removed.
    """
    if not path.name.startswith(PREFIX):
        raise SimulationError(f"{path} is no control group of a simulation; it is left alone")
    if not path.is_dir():
        return
    for inner in sorted(folder for folder in path.iterdir() if folder.is_dir()):
        kill_members(inner)
        _remove_empty(inner)
    kill_members(path)
    _remove_empty(path)


def remove_leftovers(parents: Iterable[Path], root: Path = Path("/")) -> list[str]:
    """Remove groups below some others whose makers are gone; returns their names.

    Finds what a journal that was lost, or lies in another cache folder, would have told.
    """
    removed = []
    for parent in parents:
        for path in parent.glob(f"{PREFIX}*"):
            if path.is_dir() and not is_alive(path.name.removeprefix(PREFIX), root):
                try:
                    remove_group(path)
                except (OSError, SimulationError) as error:
                    _log.warning("%s", error)
                    continue
                removed.append(path.name)
    return removed


def undo_group(entry: Mapping[str, Any]) -> None:
    """Remove a group that a journal names.

    Raises:
        SimulationError: it cannot be removed.
    """
    remove_group(Path(str(entry.get("path", ""))))


def _remove_empty(path: Path) -> None:
    """Remove a folder of the system's tree; its files go with it. It is busy until the last one has left."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if time.monotonic() > until:
                raise SimulationError(
                    f"the control group {path} cannot be removed ({error.strerror or error}); remove it with "
                    "rmdir when its processes are gone"
                ) from error
            time.sleep(_PAUSE_S)
