"""Limits by a control group of version 2: below one that is delegated to this user, or in a systemd scope.

In: a budget. Out: an enforcement. `memory.max` counts anonymous, shared and file pages; the last are dropped
and read again, and when nothing is left to drop the kernel kills. Android 17 sets `memory.high` and kills by
its own rule after a delay; with `memory.max` a run that would be killed there is killed here at once, and
always.

Two ways in, since a process can be moved only below a group that this user may write:

    below PARENT     PARENT hands the memory controller on, and is the own group or one above it
    in a scope       `systemd-run --user --scope` starts the child in a group of its own, below which it makes
                     the limited one (`launch.py`); a second process keeps the scope until it was read
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.trace import Enforced, EnforcementKind, Sample
from autoglm_edge.errors import SimulationError

from .cgroup_v1 import taken
from .counters import PAGE_BYTES, GroupCounters
from .entry import Entry
from .groups import PREFIX, Group, kill_members
from .mechanism import Mechanism, open_swap
from .mounts import v2_parent, v2_tree

CONTROLLER = "memory"
_SCOPE = ("systemd-run", "--user", "--scope", "--quiet", "--collect")
_SCOPE_S = 10.0


class CgroupV2(Mechanism):
    """Limits of one run; see `enforcement.Enforcement`."""

    kind: EnforcementKind = "cgroup_v2"

    def __init__(self, budget: Budget, *, root: Path = Path("/"), notes: Sequence[str] = ()) -> None:
        """Prepare; nothing is made."""
        super().__init__(root, notes)
        self._budget = budget
        self._memory: Group | None = None
        self._scope: Path | None = None
        self._swap_bytes = 0
        self._limit_bytes = budget.limit_bytes - budget.limit_bytes % PAGE_BYTES

    @staticmethod
    def why_not(budget: Budget, root: Path = Path("/")) -> str:
        """Why this cannot hold a budget here, a part of a sentence; "" if it can."""
        tree = v2_tree(root)
        if tree is None:
            return "control groups of version 2 are not mounted"
        if CONTROLLER not in _words(tree.mount / "cgroup.controllers"):
            return "the memory controller is not in the unified tree"
        if v2_parent(CONTROLLER, root) is None and (reason := no_scope(root)):
            return f"this process cannot make a group with a memory limit, and {reason}"
        for folder in tree.upwards():
            outer = _text(folder / "memory.max")
            if outer.isdigit() and int(outer) < budget.limit_bytes:
                return (
                    f"this process itself may have {int(outer) >> 20} MiB, less than the "
                    f"{budget.limit_bytes >> 20} MiB to be simulated"
                )
        return ""

    def make(self) -> None:
        """Make the group, or prepare the scope."""
        if reason := self.why_not(self._budget, self.root):
            raise SimulationError(f"cgroup_v2 cannot be used: {reason}")
        self._swap_bytes = open_swap(self, self._budget.swap_bytes)
        parent = v2_parent(CONTROLLER, self.root)
        if parent is not None:
            group = self._memory = self.keep(Group.make(parent, self.journal))
            for name, value in self._files():
                if name == "memory.max" or group.has(name):
                    group.write(name, value)
            self._limit_bytes = taken(group, "memory.max", self._limit_bytes)
        if self._budget.kill_delay_s:
            self.notes.append(
                f"the kernel kills at the limit; the device would slow the app down for up to "
                f"{self._budget.kill_delay_s:g} s first"
            )

    @property
    def entry(self) -> Entry:
        """How the child gets in."""
        if self._memory is not None:
            return Entry(groups=(self._memory.path,))
        unit = f"--unit={PREFIX}{self.journal.name}"
        wrapper = (
            "systemd-run",
            "--user",
            "--scope",
            "--quiet",
            "--collect",
            unit,
            "-p",
            "Delegate=yes",
            "--",
        )
        return Entry(scope=tuple(self._files()), wrapper=wrapper)

    @property
    def group(self) -> Group | None:
        """The group; None in a scope."""
        return self._memory

    def entered(self, pid: int, scope: Path | None) -> GroupCounters:
        """Counters of the group."""
        self._scope = scope
        folder = self._memory.path if self._memory is not None else scope
        return GroupCounters(folder, pressure=folder)

    def kill(self) -> None:
        """Kill all processes in the group."""
        super().kill()
        if self._scope is not None:
            kill_members(self._scope)

    def is_exceeded(self, sample: Sample) -> bool:
        """False: the kernel does it."""
        return False

    def describe(self) -> Enforced:
        """What held the child."""
        return Enforced(self.kind, self._limit_bytes, self._swap_bytes, True, tuple(self.notes))

    def _files(self) -> Iterator[tuple[str, str]]:
        yield "memory.max", str(self._limit_bytes)
        yield "memory.swap.max", str(self._swap_bytes)
        yield "memory.oom.group", "1"


def no_scope(root: Path = Path("/")) -> str:
    """Why no scope can be had from the user's systemd, a part of a sentence; "" if one was had just now."""
    if shutil.which("systemd-run") is None:
        return "there is no systemd-run"
    user = os.getuid() if hasattr(os, "getuid") else 0
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{user}"
    folder = root / runtime.lstrip("/")
    if not any((folder / name).exists() for name in ("systemd/private", "bus")):
        return "no systemd of this user runs"
    tree = v2_tree(root)
    if tree is not None:
        service = tree.mount / f"user.slice/user-{user}.slice/user@{user}.service"
        if service.is_dir() and CONTROLLER not in _words(service / "cgroup.controllers"):
            return "the memory controller is not delegated to this user"
    return try_scope()


def try_scope() -> str:
    """Start a program that does nothing in a scope; why that fails, a part of a sentence, or ""."""
    try:
        tried = subprocess.run(
            [*_SCOPE, "--", "true"], capture_output=True, text=True, timeout=_SCOPE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"systemd-run does not answer ({error})"
    words = tried.stderr.strip().splitlines()
    return f"systemd-run refuses ({words[-1] if words else tried.returncode})" if tried.returncode else ""


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
