"""A limit without root and without groups: RLIMIT_DATA.

In: a budget. Out: an enforcement. The system refuses memory instead of killing: an allocation beyond the
limit fails. It counts private writable memory when it is asked for, touched or not: the KV cache of a whole
context and the stacks of threads count from the start, so it is stricter than a phone there. It does not
count shared memory and mapped files, so a model that is mapped is never read twice here, as it would be on a
phone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.trace import Enforced, EnforcementKind, Sample

from .counters import GroupCounters
from .entry import Entry
from .groups import Group
from .mechanism import FILES_NOTE, Mechanism


class DataLimit(Mechanism):
    """Limits of one run; see `enforcement.Enforcement`."""

    kind: EnforcementKind = "rlimit_data"

    def __init__(self, budget: Budget, *, root: Path = Path("/"), notes: Sequence[str] = ()) -> None:
        """Prepare; nothing is made."""
        super().__init__(root, notes)
        self._limit_bytes = budget.limit_bytes
        self.notes += [
            FILES_NOTE,
            "memory counts when it is asked for, not when it is used",
        ]
        if budget.swap_bytes:
            self.notes.append(
                f"there is no swap: the limit is stricter than the device's by {budget.swap_bytes >> 20} MiB"
            )

    @staticmethod
    def why_not(budget: Budget, root: Path = Path("/")) -> str:
        """Why this cannot hold a budget here, a part of a sentence; "" if it can."""
        if not sys.platform.startswith("linux"):
            return "only Linux counts anonymous memory under RLIMIT_DATA"
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard != resource.RLIM_INFINITY and hard < budget.limit_bytes:
            return (
                f"this process itself may have {hard >> 20} MiB, less than the "
                f"{budget.limit_bytes >> 20} MiB to be simulated"
            )
        return ""

    def make(self) -> None:
        """Make a group to watch, if that can be had; the limit is taken by the child."""
        self.make_watch_group()

    @property
    def entry(self) -> Entry:
        """How the child gets in."""
        groups = () if self.watch_group is None else (self.watch_group.path,)
        return Entry(groups=groups, data_limit_bytes=self._limit_bytes)

    @property
    def group(self) -> Group | None:
        """None."""
        return None

    def entered(self, pid: int, scope: Path | None) -> GroupCounters:
        """Counters of the watched group."""
        return GroupCounters(None, pressure=self.watch_group.path if self.watch_group else None)

    def is_exceeded(self, sample: Sample) -> bool:
        """False: the kernel refuses."""
        return False

    def describe(self) -> Enforced:
        """What held the child."""
        return Enforced(self.kind, self._limit_bytes, 0, False, tuple(self.notes))
