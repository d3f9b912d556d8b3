"""Less processor time as a device heats up, and slower storage: where this host can hold the child to it.

In: a budget. Out: groups that the child joins, whose quota is moved along the device's thermal curve. Limits
time, not speed: a host core that runs half of the time does half of the work, which is as near to a hot phone
as a quota comes. The projected speed of a device does not depend on it.
"""

from __future__ import annotations

import os
from pathlib import Path

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.errors import SimulationError
from autoglm_edge.runtime.machine.limits import Limits, limits
from autoglm_edge.runtime.machine.topology import usable_cores

from .groups import Group
from .journal import Journal
from .mounts import v1_parent

PERIOD_US = 20_000
"""A short period spreads the waiting evenly; at 20 ms the share of work done is that of the quota."""
STEP = 0.01
"""Smallest change of the quota that is written."""
LEAST_US = 1000
"""The system takes no smaller quota."""


class Throttle:
    """Holds back processor and storage of one run."""

    def __init__(self, budget: Budget, root: Path = Path("/")) -> None:
        """Prepare; nothing is made.

        Args:
            budget: of the device.
            root: where /sys and /proc lie.
        """
        allowed: Limits = limits(root)
        self._cores = min(budget.threads, usable_cores(), allowed.cpus or budget.threads)
        self._budget = budget
        self._root = root
        self._made: list[Group] = []
        self._cpu: tuple[Group, bool] | None = None
        self._share = 1.0
        self.notes: list[str] = []

    @property
    def groups(self) -> tuple[Path, ...]:
        """What the child joins beside the group of its enforcement."""
        return tuple(group.path for group in self._made)

    def open_cpu(self, journal: Journal, memory: Group | None) -> None:
        """Make a quota.

        Args:
            journal: of the run.
            memory: the unified group that limits memory, if there is one: it has the quota too.

        Raises:
            SimulationError: this host offers none.
        """
        if memory is not None and memory.has("cpu.max"):
            self._cpu = (memory, True)
        elif (parent := v1_parent("cpu", self._root)) is not None:
            group = Group.make(parent, journal)
            self._made.append(group)
            group.write("cpu.cfs_period_us", PERIOD_US)
            self._cpu = (group, False)
        else:
            raise SimulationError(
                "processor time cannot be limited here: no group with a quota can be made; run as root, or "
                "leave the throttling out"
            )
        self._write(1.0)

    def open_storage(self, file: Path, journal: Journal, memory: Group | None) -> None:
        """Limit reads of the disk that holds a file.

        Raises:
            SimulationError: this host cannot.
        """
        disk = whole_disk(file, self._root)
        speed = int(self._budget.storage_bytes_per_s)
        if disk and memory is not None and memory.has("io.max"):
            memory.write("io.max", f"{disk} rbps={speed}")
        elif disk and (parent := v1_parent("blkio", self._root)) is not None:
            group = Group.make(parent, journal)
            self._made.append(group)
            group.write("blkio.throttle.read_bps_device", f"{disk} {speed}")
        else:
            raise SimulationError(
                f"reads of {file} cannot be limited here: no group for its disk can be made; run as root, or "
                "leave the throttling of storage out"
            )
        self.notes.append(
            f"storage is held to {speed / 1e6:.0f} MB/s at most; a disk of this host that is slower "
            "stays slower"
        )

    def at(self, at_s: float) -> None:
        """Move the quota to where the curve is at a moment."""
        if self._cpu is None:
            return
        share = self._budget.cpu_share(at_s)
        if abs(share - self._share) >= STEP:
            self._write(share)

    def close(self) -> None:
        """Remove the groups.

        Raises:
            SimulationError: one cannot be removed.
        """
        self._cpu = None
        while self._made:
            self._made.pop().remove()

    def _write(self, share: float) -> None:
        if self._cpu is None:
            return
        group, is_v2 = self._cpu
        quota = max(LEAST_US, int(share * self._cores * PERIOD_US))
        if is_v2:
            group.write("cpu.max", f"{quota} {PERIOD_US}")
        else:
            group.write("cpu.cfs_quota_us", quota)
        self._share = share


def whole_disk(file: Path, root: Path = Path("/")) -> str:
    """MAJOR:MINOR of the disk that holds a file, of the whole one if it is a partition; "" without one."""
    try:
        device = file.stat().st_dev
    except OSError:
        return ""
    if not hasattr(os, "major"):
        return ""
    folder = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if (folder / "partition").exists():
        folder = folder.resolve().parent
    try:
        return (folder / "dev").read_text().strip()
    except OSError:
        return ""
