"""Which CPUs each replica gets: disjoint, whole cores, and as far as possible of one socket.

In: how many replicas. Out: a tuple of CPU numbers for each. Knows nothing of what runs on them.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from autoglm_edge.errors import RequestError
from autoglm_edge.runtime.machine.topology import usable_cpus


def split_cpus(count: int, root: Path = Path("/"), usable: list[int] | None = None) -> list[tuple[int, ...]]:
    """The CPUs of each of `count` replicas; empty tuples where the system cannot tell.

    Cores are taken in the order of their memory: with as many replicas as sockets, each has its own.

    Args:
        count: of replicas.
        root: where /sys lies; another one in tests.
        usable: CPUs that may be used; None asks the system.

    Raises:
        RequestError: there are fewer cores than replicas.
    """
    cpus = usable_cpus() if usable is None else usable
    if not cpus:
        return [()] * count
    cores: dict[tuple[int, ...], list[int]] = {}
    for cpu in cpus:
        siblings = _listed(root / f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list")
        cores.setdefault(siblings or (cpu,), []).append(cpu)
    memory = _memory_of_cpus(root)
    found = sorted(cores.values(), key=lambda core: (memory.get(core[0], 0), core))
    if count > len(found):
        raise RequestError(
            f"{count} replicas need a core each, and there are {len(found)}; use fewer --replicas"
        )
    bounds = [index * len(found) // count for index in range(count + 1)]
    return [
        tuple(sorted(cpu for core in found[start:stop] for cpu in core)) for start, stop in pairwise(bounds)
    ]


def _memory_of_cpus(root: Path) -> dict[int, int]:
    """The number of the memory node that a CPU is near to."""
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*/cpulist"))
    return {cpu: int(path.parent.name[4:]) for path in nodes for cpu in _listed(path)}


def _listed(path: Path) -> tuple[int, ...]:
    """The CPUs of a list like "0-3,8"; empty if the file is absent or says something else."""
    cpus: list[int] = []
    try:
        for piece in path.read_text(encoding="ascii").strip().split(","):
            first, _, last = piece.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    except (OSError, ValueError):
        return ()
    return tuple(cpus)
