"""Limits by looking: the runner kills a child that it sees above the limit. And none at all, for comparison.

In: a budget. Out: an enforcement. What grows and shrinks between two looks is not seen, file pages are never
dropped, and a kill comes one look late: the weakest mechanism, for systems without a better one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.trace import Enforced, EnforcementKind, Sample

from .counters import GroupCounters
from .entry import Entry
from .groups import Group
from .mechanism import FILES_NOTE, Mechanism


class Watchdog(Mechanism):
    """Limits of one run; see `enforcement.Enforcement`."""

    kind: EnforcementKind = "watchdog"

    def __init__(self, budget: Budget, *, root: Path = Path("/"), notes: Sequence[str] = ()) -> None:
        """Prepare; nothing is made."""
        super().__init__(root, notes)
        self._budget = budget

    @staticmethod
    def why_not(budget: Budget, root: Path = Path("/")) -> str:
        """Why this cannot hold a budget here: it always can, as far as it goes."""
        return ""

    def make(self) -> None:
        """Make a group to watch, if that can be had."""
        self.notes += self._weaknesses()
        self.make_watch_group()

    @property
    def entry(self) -> Entry:
        """How the child gets in."""
        groups = () if self.watch_group is None else (self.watch_group.path,)
        return Entry(groups=groups, sealed=False)

    @property
    def group(self) -> Group | None:
        """None."""
        return None

    def entered(self, pid: int, scope: Path | None) -> GroupCounters:
        """Counters of the watched group."""
        return GroupCounters(None, pressure=self.watch_group.path if self.watch_group else None)

    def is_exceeded(self, sample: Sample) -> bool:
        """Whether what cannot be dropped is above the limit."""
        return sample.held_bytes > self._budget.limit_bytes

    def describe(self) -> Enforced:
        """What held the child."""
        return Enforced(self.kind, self._budget.limit_bytes, 0, False, tuple(self.notes))

    def _weaknesses(self) -> list[str]:
        found = [
            "the child is only looked at: what it takes between two looks is not seen",
            FILES_NOTE,
        ]
        if self._budget.swap_bytes:
            swap = self._budget.swap_bytes >> 20
            found.append(f"there is no swap: the limit is stricter than the device's by {swap} MiB")
        return found


class Nothing(Watchdog):
    """No limits: what a run takes when it may take all."""

    kind: EnforcementKind = "none"

    def is_exceeded(self, sample: Sample) -> bool:
        """False."""
        return False

    def describe(self) -> Enforced:
        """What held the child: nothing."""
        return Enforced(self.kind, None, 0, False, tuple(self.notes))

    def _weaknesses(self) -> list[str]:
        return ["the child is only watched, not limited"]
