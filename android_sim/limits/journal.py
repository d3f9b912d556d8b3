"""A journal of what a run made on this host, so that the next run can undo what a crash left.

In: what is about to be made. Out: a small file for as long as it is there. A run that is killed cannot remove
its groups, its swap or its setting of the read-ahead; the next one finds the file, sees that its writer is
gone, and removes them first. Knows the owner by process id, start time and boot, since ids are used again.

    CACHE/simulator/SPACE-PID-START-N.json     {"boot": ..., "made": [{"kind": ..., ...}]}

SPACE is the view of processes, which a container has its own of. A cache folder may be shared with one, or
with another machine: what is noted there is left to them, and thrown away when it is old.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autoglm_edge.errors import DeviceError, SimulationError
from autoglm_edge.files import replace_file
from autoglm_edge.runtime.machine.folders import cache_folder

Undo = Callable[[Mapping[str, Any]], None]
LIMIT_BYTES = 1 << 16
STALE_S = 7 * 86400
"""Age at which a journal of another machine, or of an earlier boot of this one, is thrown away."""
_numbers = itertools.count()
_log = logging.getLogger(__name__)


class Journal:
    """What one run made, written down before it is made and struck off after it is removed."""

    def __init__(self, folder: Path | None = None, root: Path = Path("/")) -> None:
        """Begin an empty one; nothing is written yet.

        Args:
            folder: of all journals; default in the user's cache folder.
            root: where /proc lies.

        Raises:
            SimulationError: this user has no home folder.
        """
        self.owner = owner_name(os.getpid(), root)
        self.name = f"{self.owner}-{next(_numbers)}"
        self._folder = journal_folder() if folder is None else folder
        self._path = self._folder / f"{self.name}.json"
        self._boot = boot_id(root)
        self._made: list[dict[str, Any]] = []

    def add(self, kind: str, **facts: str | int) -> None:
        """Note what is about to be made.

        Raises:
            SimulationError: it cannot be written down, so it must not be made.
        """
        self._made.append({"kind": kind, **facts})
        self._write()

    def strike(self, kind: str, **facts: str | int) -> None:
        """Note that it is gone."""
        entry = {"kind": kind, **facts}
        if entry in self._made:
            self._made.remove(entry)
            self._write()

    def _write(self) -> None:
        try:
            if not self._made:
                self._path.unlink(missing_ok=True)
                return
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(self._path, json.dumps({"boot": self._boot, "made": self._made}).encode())
        except OSError as error:
            raise SimulationError(
                f"{self._path} cannot be written ({error.strerror or error}), and without it a crash would "
                "leave limits behind; free some disk, or set AUTOGLM_EDGE_CACHE to another folder"
            ) from error


def undo_leftovers(undo: Mapping[str, Undo], folder: Path | None = None, root: Path = Path("/")) -> list[str]:
    """Remove what runs left whose process is gone.

    Args:
        undo: by kind of entry, what removes it; it must be able to find it gone already.
        folder: of all journals.
        root: where /proc lies.

    Returns:
        Names of the runs that were cleaned up after. What cannot be removed stays noted, and is logged.
    """
    done = []
    try:
        paths = sorted((journal_folder() if folder is None else folder).glob("*.json"))
    except (OSError, SimulationError):
        return []
    for path in paths:
        entries, boot = _read(path)
        try:
            if boot != boot_id(root):
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()
                continue
            if is_alive(path.stem, root):
                continue
            for entry in reversed(entries):
                if (remove := undo.get(str(entry.get("kind")))) is not None:
                    remove(entry)
            path.unlink(missing_ok=True)
            path.with_suffix(".part").unlink(missing_ok=True)
        except (OSError, SimulationError) as error:
            _log.warning("what the run %s left cannot be removed: %s", path.stem, error)
            continue
        done.append(path.stem)
    return done


def journal_folder() -> Path:
    """The folder of all journals.

    Raises:
        SimulationError: this user has no home folder.
    """
    try:
        return cache_folder() / "simulator"
    except DeviceError as error:
        raise SimulationError(str(error)) from error


def owner_name(pid: int, root: Path = Path("/")) -> str:
    """A process by view, id and start time, which together are used once per boot."""
    return f"{_process_space(root)}-{pid}-{_start_time(pid, root) or 0}"


def is_alive(name: str, root: Path = Path("/")) -> bool:
    """Whether the process that a name is of still runs; one that cannot be seen from here counts as if."""
    space, pid, start = (*name.split("-"), "", "", "")[:3]
    if space != _process_space(root) or not pid.isdigit():
        return True
    return start == str(_start_time(int(pid), root) or 0)


def boot_id(root: Path = Path("/")) -> str:
    """Of this boot of the system; "" where it is not told."""
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_space(root: Path) -> str:
    """Number of the view of processes; "0" where it is not told."""
    try:
        name = os.readlink(root / "proc/self/ns/pid")
    except OSError:
        return "0"
    return "".join(character for character in name if character.isdigit()) or "0"


def _start_time(pid: int, root: Path) -> int | None:
    """In ticks since the boot; None if there is no such process."""
    try:
        text = (root / f"proc/{pid}/stat").read_text()
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _read(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Entries of a journal, and the boot it is of; none if it is damaged."""
    try:
        if path.stat().st_size > LIMIT_BYTES:
            return [], "damaged"
        document = json.loads(path.read_text())
        return [entry for entry in document["made"] if isinstance(entry, dict)], str(document["boot"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [], "damaged"
