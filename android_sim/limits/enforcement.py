"""What holds the child to its limits: the interface of the mechanisms, and the choice among them.

In: a wish and a budget. Out: an `Enforcement`, a context manager: inside it the limits are there, outside
they are not, whatever happened between. The mechanisms, best first:

    cgroup_v2     a control group of version 2: below a delegated one, or in a scope of the user's systemd
    cgroup_v1     the same of version 1
    rlimit_data   RLIMIT_DATA: anonymous memory as it is asked for; neither root nor groups are needed
    watchdog      looks at the child and kills it above the limit; for systems that can do no better
    none          only looks

RLIMIT_AS is not among them: it counts a mapped model as if it were copied, and refuses programs that fit.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self, get_args

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.trace import Enforced, EnforcementKind, Sample
from autoglm_edge.errors import SimulationError

from .cgroup_v1 import CgroupV1
from .cgroup_v2 import CgroupV2
from .counters import GroupCounters
from .entry import Entry
from .groups import Group
from .journal import Journal
from .rlimit import DataLimit
from .watchdog import Nothing, Watchdog

Wish = Literal["auto", "cgroup_v2", "cgroup_v1", "rlimit_data", "watchdog", "none"]


class Enforcement(Protocol):
    """Limits of one run. Entered, they are there; left, everything made for them is gone.

    Attributes:
        kind: of mechanism.
        journal: of what it makes.
    """

    kind: EnforcementKind
    journal: Journal

    def __enter__(self) -> Self:
        """Make the limits.

        Raises:
            SimulationError: the system refuses; nothing is left behind.
        """
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what is inside and remove everything.

        Raises:
            SimulationError: something cannot be removed; the next run tries again.
        """
        ...

    @property
    def entry(self) -> Entry:
        """How the child gets in."""
        ...

    @property
    def group(self) -> Group | None:
        """The unified group that limits memory, if it is one: quotas are set there, too."""
        ...

    def entered(self, pid: int, scope: Path | None) -> GroupCounters:
        """The child is in: the counters of its groups, to be closed by the caller.

        Args:
            pid: of the child.
            scope: folder that it made for itself, if that is how it got in.
        """
        ...

    def is_exceeded(self, sample: Sample) -> bool:
        """Whether the runner must kill the child, because this mechanism cannot."""
        ...

    def kill(self) -> None:
        """Kill all processes in all groups."""
        ...

    def describe(self) -> Enforced:
        """What held the child."""
        ...


_MECHANISMS: dict[str, type[CgroupV2 | CgroupV1 | DataLimit | Watchdog | Nothing]] = {
    "cgroup_v2": CgroupV2,
    "cgroup_v1": CgroupV1,
    "rlimit_data": DataLimit,
    "watchdog": Watchdog,
    "none": Nothing,
}


def offered(budget: Budget, root: Path = Path("/")) -> dict[str, str]:
    """The mechanisms, best first, each with why it cannot hold this budget here; "" if it can."""
    return {name: mechanism.why_not(budget, root) for name, mechanism in _MECHANISMS.items()}


def choose_enforcement(wish: Wish, budget: Budget, root: Path = Path("/")) -> Enforcement:
    """The mechanism that was asked for, or the best one of this host.

    Args:
        wish: "auto" for the best one that really limits, or a kind.
        budget: that it must hold.
        root: where /sys and /proc lie.

    Raises:
        SimulationError: there is no such kind, or it cannot hold this budget here.
    """
    if wish not in get_args(Wish):
        raise SimulationError(f"the enforcement is {wish!r}, must be one of {', '.join(get_args(Wish))}")
    if wish != "auto":
        if reason := _MECHANISMS[wish].why_not(budget, root):
            raise SimulationError(f"{wish} cannot be used: {reason}; choose another enforcement, or auto")
        return _MECHANISMS[wish](budget, root=root)
    reasons: list[str] = []
    for name, reason in offered(budget, root).items():
        if not reason:
            return _MECHANISMS[name](budget, root=root, notes=reasons)
        reasons.append(f"not {name}: {reason}")
    raise SimulationError(f"nothing here can hold a child to a limit: {'; '.join(reasons)}")
