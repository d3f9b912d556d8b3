"""What all enforcements share: things are made in order, noted before they are there, and removed in reverse.

In: a mechanism that says what to make. Out: a context manager around it. What a dead run left is removed
before anything is made.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from autoglm_edge.errors import SimulationError

from .groups import KIND as GROUP
from .groups import Group, kill_members, remove_leftovers, undo_group
from .journal import Journal, undo_leftovers
from .mounts import hierarchies, v2_parent
from .readahead import KIND as READAHEAD
from .readahead import undo_readahead
from .zram import KIND as ZRAM
from .zram import Zram, undo_zram

FILES_NOTE = (
    "pages of mapped files are not limited, so nothing is read twice for want of memory, as it would be on "
    "the device"
)
_log = logging.getLogger(__name__)


class Removable(Protocol):
    """Something that a run made."""

    def remove(self) -> None:
        """Undo it."""


Made = TypeVar("Made", bound=Removable)


class Mechanism:
    """A mechanism's things, from `__enter__` to `__exit__`.

    Attributes:
        root: where /sys and /proc lie; another one in tests.
        journal: of what is made.
        notes: what differs from a phone, a sentence each.
        watch_group: a group without limits, for pressure, processor time and the children of the child.
    """

    def __init__(self, root: Path, notes: Sequence[str]) -> None:
        """Prepare; nothing is made."""
        self.root = root
        self.journal = Journal(root=root)
        self.notes = list(notes)
        self.watch_group: Group | None = None
        self._made: list[Removable] = []

    def __enter__(self) -> Self:
        """Remove what dead runs left, then make what this one needs.

        Raises:
            SimulationError: the system refuses; nothing is left behind.
        """
        clean_up(self.root)
        try:
            self.make()
        except BaseException:
            self._remove_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove everything.

        Raises:
            SimulationError: something cannot be removed, and nothing else went wrong before.
        """
        failures = self._remove_all()
        if failures and error is None:
            raise failures[0]
        for failure in failures:
            _log.warning("%s", failure)

    def make(self) -> None:
        """Make the limits; what is made goes through `keep`."""
        raise NotImplementedError

    def keep(self, made: Made) -> Made:
        """Remove it at the end."""
        self._made.append(made)
        return made

    def make_watch_group(self) -> None:
        """Make a unified group for its counters, where this user may; without it there is less to tell."""
        parent = v2_parent(None, self.root)
        if parent is None:
            self.notes.append("the time that the child waits for memory is not known here")
            return
        try:
            self.watch_group = self.keep(Group.make(parent, self.journal))
        except SimulationError as error:
            self.notes.append(f"the time that the child waits for memory is not known here: {error}")

    def kill(self) -> None:
        """Kill all processes in all groups."""
        for made in self._made:
            if isinstance(made, Group):
                kill_members(made.path)

    def _remove_all(self) -> list[SimulationError]:
        """Remove things in reverse; a signal meanwhile has to wait until that is done."""
        failures: list[SimulationError] = []
        interrupted: BaseException | None = None
        while self._made:
            made = self._made.pop()
            for _ in range(2):
                try:
                    made.remove()
                    break
                except SimulationError as error:
                    failures.append(error)
                    break
                except (KeyboardInterrupt, SystemExit) as error:
                    interrupted = error
        self.watch_group = None
        if interrupted is not None:
            raise interrupted
        return failures


def open_swap(mechanism: Mechanism, size_bytes: int) -> int:
    """Compressed swap for a run, where it can really be had.

    Args:
        mechanism: that keeps it, and notes why there is none.
        size_bytes: wanted.

    Returns:
        Bytes that are there; 0 without, which is stricter than the device.
    """
    if not size_bytes:
        return 0
    try:
        device = mechanism.keep(Zram.make(size_bytes, mechanism.journal, mechanism.root))
    except SimulationError as error:
        mechanism.notes.append(
            f"{error}; the limit is stricter than the device's by {size_bytes >> 20} MiB of swap"
        )
        return 0
    return device.size_bytes


def clean_up(root: Path = Path("/")) -> list[str]:
    """Remove what runs left that were killed; returns their names."""
    undo: Mapping[str, Any] = {
        GROUP: undo_group,
        ZRAM: functools.partial(undo_zram, root=root),
        READAHEAD: functools.partial(undo_readahead, root=root),
    }
    names = undo_leftovers(undo, root=root)
    parents = {folder for tree in hierarchies(root) for folder in tree.upwards()}
    return names + remove_leftovers(sorted(parents), root)
