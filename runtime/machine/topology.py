"""How many threads pay on this machine, and where: from its cores and limits, not only its number of CPUs.

In: Linux' own description of the CPUs under /sys, /proc and the control groups; elsewhere only a count. Out:
a number of threads, the CPUs they are to be kept on, and the reason. Knows nothing of graphs.

An operator is cut into equal pieces, one per thread, and waits for the slowest. So the second thread of a
core does not help, a small core beside large ones holds all of them up, and a thread beyond the quota of a
container stops all until the next period. Where there are small cores, threads are kept on the large ones;
cores that are alike are the system's to choose.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .limits import limits

LITTLE = 0.5
"""Cores with less than this part of the largest one's capacity are left out."""


@dataclass(frozen=True)
class Threads:
    """How many threads an operator gets.

    Attributes:
        count: at least 1.
        reason: of the count, a part of a sentence.
        cpus: that they are to be kept on; any if empty.
    """

    count: int
    reason: str
    cpus: tuple[int, ...] = ()


def usable_cpus() -> list[int]:
    """Numbers of the CPUs that this process may run on; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def usable_cores() -> int:
    """How many CPUs this process may run on."""
    return len(usable_cpus()) or os.cpu_count() or 1


def choose_threads(asked: int = 0, root: Path = Path("/")) -> Threads:
    """The number asked for, or else the one that fits the machine.

    Args:
        asked: 0 chooses.
        root: where /sys and /proc lie; another one in tests.
    """
    if asked:
        return Threads(asked, "asked for")
    usable = usable_cpus()
    if not usable:
        count = usable_cores()
        return Threads(count, f"{_cores(count)}, this system tells no more")
    return threads_of(usable, root)


def threads_of(usable: list[int], root: Path) -> Threads:
    """One thread per physical, large core among `usable`, and no more than the quota of the control group."""
    folder = root / "sys/devices/system/cpu"
    first: dict[tuple[int, ...], int] = {}  # the CPU that stands for each core
    for cpu in usable:
        siblings = _cpu_list(folder / f"cpu{cpu}/topology/core_cpus_list")
        siblings = siblings or _cpu_list(folder / f"cpu{cpu}/topology/thread_siblings_list") or (cpu,)
        first.setdefault(siblings, cpu)
    cores = list(first.values())
    reasons = [_cores(len(cores))]
    if len(cores) < len(usable):
        reasons.append(f"{len(usable)} CPUs")

    large = _large(cores, root)
    if len(large) < len(cores):
        reasons.append(f"{len(large)} of them large")
    count = len(large)
    quota = limits(root).cpus
    if quota is not None and quota < count:
        count = max(1, int(quota))
        reasons.append(f"a quota of {quota:.3g}")
    return Threads(count, ", ".join(reasons), tuple(large) if len(large) < len(cores) else ())


def _large(cores: list[int], root: Path) -> list[int]:
    """The performance cores of a machine that has two kinds; all cores of any other."""
    performance = set(_cpu_list(root / "sys/devices/cpu_core/cpus"))  # Intel's hybrids
    if performance and _cpu_list(root / "sys/devices/cpu_atom/cpus"):
        return [cpu for cpu in cores if cpu in performance] or cores
    folder = root / "sys/devices/system/cpu"
    capacity = {cpu: _number(folder / f"cpu{cpu}/cpu_capacity") for cpu in cores}  # ARM
    most = max(capacity.values())
    return [cpu for cpu in cores if capacity[cpu] >= LITTLE * most]


def _cpu_list(path: Path) -> tuple[int, ...]:
    """The CPUs of a list like "0-3,8"; empty if the file is absent or says something else."""
    cpus: list[int] = []
    try:
        for piece in path.read_text().strip().split(","):
            first, _, last = piece.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    except (OSError, ValueError):
        return ()
    return tuple(cpus)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"
