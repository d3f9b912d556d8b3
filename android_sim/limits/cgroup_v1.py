"""Limits by a control group of version 1, with swap if zram can be had, and pressure from the unified tree.

In: a budget. Out: an enforcement. `limit_in_bytes` counts what a phone's `memory.high` counts: anonymous,
shared and file pages that the child was first to touch; the last are dropped and read again, and when nothing
is left to drop the kernel kills. `memsw.limit_in_bytes` counts memory and swap together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.trace import Enforced, EnforcementKind, Sample
from autoglm_edge.errors import SimulationError

from .counters import GroupCounters
from .entry import Entry
from .groups import Group
from .mechanism import Mechanism, open_swap
from .mounts import v1_parent, v1_tree

CONTROLLER = "memory"


class CgroupV1(Mechanism):
    """Limits of one run; see `enforcement.Enforcement`."""

    kind: EnforcementKind = "cgroup_v1"

    def __init__(self, budget: Budget, *, root: Path = Path("/"), notes: Sequence[str] = ()) -> None:
        """Prepare; nothing is made."""
        super().__init__(root, notes)
        self._budget = budget
        self._memory: Group | None = None
        self._limit_bytes = self._swap_bytes = 0

    @staticmethod
    def why_not(budget: Budget, root: Path = Path("/")) -> str:
        """Why this cannot hold a budget here, a part of a sentence; "" if it can."""
        tree = v1_tree(CONTROLLER, root)
        if tree is None:
            return "the memory controller of version 1 is not mounted"
        parent = v1_parent(CONTROLLER, root)
        if parent is None:
            return f"this user cannot make groups below {tree.own}"
        return outer_limit(parent, budget)

    def make(self) -> None:
        """Make the group, set it, and look whether the system took what it was given."""
        parent = v1_parent(CONTROLLER, self.root)
        if parent is None or self.why_not(self._budget, self.root):
            raise SimulationError(f"cgroup_v1 cannot be used: {self.why_not(self._budget, self.root)}")
        group = self._memory = self.keep(Group.make(parent, self.journal))
        group.write("memory.limit_in_bytes", self._budget.limit_bytes)
        self._limit_bytes = taken(group, "memory.limit_in_bytes", self._budget.limit_bytes)
        counts_swap = group.has("memory.memsw.limit_in_bytes")
        self._swap_bytes = open_swap(self, self._budget.swap_bytes) if counts_swap else 0
        if counts_swap:
            group.write("memory.memsw.limit_in_bytes", self._limit_bytes + self._swap_bytes)
        elif self._budget.swap_bytes:
            self.notes.append(
                "this kernel does not count swap per group, so there is none; the limit is stricter than the "
                f"device's by {self._budget.swap_bytes >> 20} MiB of swap"
            )
        if not self._swap_bytes:
            # Version 1 counts memory and swap together; a host with swap of its own may still use it.
            group.write("memory.swappiness", 0)
            if host_swaps(self.root):
                self.notes.append(
                    "this host swaps, and may take pages of the child, too; they count as if they were in "
                    "memory"
                    if counts_swap
                    else "this host swaps, and the kernel does not count that per group: the limit is laxer"
                )
        self.make_watch_group()
        if self._budget.kill_delay_s:
            self.notes.append(
                f"the kernel kills at the limit; the device would slow the app down for up to "
                f"{self._budget.kill_delay_s:g} s first"
            )

    @property
    def entry(self) -> Entry:
        """How the child gets in."""
        found = [group.path for group in (self._memory, self.watch_group) if group is not None]
        return Entry(groups=tuple(found))

    @property
    def group(self) -> Group | None:
        """None: the controllers of version 1 have groups of their own."""
        return None

    def entered(self, pid: int, scope: Path | None) -> GroupCounters:
        """Counters of the groups."""
        pressure = self.watch_group.path if self.watch_group else None
        return GroupCounters(self._memory.path if self._memory else None, legacy=True, pressure=pressure)

    def is_exceeded(self, sample: Sample) -> bool:
        """False: the kernel does it."""
        return False

    def describe(self) -> Enforced:
        """What held the child."""
        return Enforced(self.kind, self._limit_bytes, self._swap_bytes, True, tuple(self.notes))


def host_swaps(root: Path = Path("/")) -> bool:
    """Whether the system has swap, of whomever."""
    try:
        return len((root / "proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return False


def taken(group: Group, name: str, wanted: int) -> int:
    """A limit as the system took it, which rounds to pages.

    Raises:
        SimulationError: it took another one.
    """
    text = group.read(name)
    value = int(text) if text.isdigit() else -1
    if not wanted - (1 << 16) <= value <= wanted:
        raise SimulationError(
            f"{group.path / name} is {text!r} after it was set to {wanted}; this system does not "
            "take the limit, choose another enforcement"
        )
    return value


def outer_limit(parent: Path, budget: Budget) -> str:
    """Why groups around the one to be made leave it no room, a part of a sentence; "" if they do."""
    try:
        lines = (parent / "memory.stat").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(" ")
        if name == "hierarchical_memory_limit" and value.isdigit() and int(value) < budget.limit_bytes:
            return (
                f"this process itself may have {int(value) >> 20} MiB, less than the "
                f"{budget.limit_bytes >> 20} MiB to be simulated"
            )
    return ""
