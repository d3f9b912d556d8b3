"""Looks at the child some 20 times a second and writes down its memory.

In: a process id and the counters of its groups. Out: `Sample`s, and what looking cost. Reads
/proc/PID/status, stat and io and the files of the groups, a few microseconds each; never smaps, which walks
all pages and holds the child's lock on its mappings meanwhile. Memory of children of the child counts too.

A group counts a page once, however many processes share it, so anonymous, shared and swapped memory are the
group's where there is one; resident file pages are the processes', since a group does not tell mapped pages
that somebody else was first to touch.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Protocol

from autoglm_edge.android_sim.limits.counters import GroupCounters, OpenFile
from autoglm_edge.android_sim.trace import Sample

INTERVAL_S = 0.05
LEAST_INTERVAL_S, MOST_INTERVAL_S = 0.02, 1.0
_FAMILY_EVERY_S = 2.0
"""How often children of the child are looked for where no group holds them together: all of /proc is read."""
_FIELDS = re.compile(rb"(RssAnon|RssFile|RssShmem|VmSwap):\s*(\d+)")
_READ = re.compile(rb"^read_bytes:\s*(\d+)", re.MULTILINE)
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Sampler(Protocol):
    """Somebody who looks at a child.

    Attributes:
        cost_s: processor time that looking took so far.
    """

    cost_s: float

    def sample(self) -> Sample | None:
        """Look once; None if the child is gone."""
        ...

    def family(self) -> list[int]:
        """The child and its children, as far as they are known."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class _Process:
    """Open files of one process."""

    def __init__(self, folder: Path) -> None:
        self._status, self._io, self._stat = (OpenFile(folder / name) for name in ("status", "io", "stat"))
        self.read_bytes: int | None = None
        self.cpu_s = 0.0

    def memory(self) -> dict[bytes, int] | None:
        """Bytes by field; None if it is gone, or has given its memory back and waits for its parent."""
        found = {name: int(kib) << 10 for name, kib in _FIELDS.findall(self._status.read())}
        return found or None

    def count(self, *, with_cpu: bool) -> None:
        """Take up its counters; those of a process that is gone stay as they were."""
        if match := _READ.search(self._io.read()):
            self.read_bytes = int(match[1])
        if (
            with_cpu
            and len(words := self._stat.read().rpartition(b")")[2].split()) > 12
            and (words[11].isdigit() and words[12].isdigit())
        ):
            self.cpu_s = (int(words[11]) + int(words[12])) / _TICKS

    def close(self) -> None:
        for file in (self._status, self._io, self._stat):
            file.close()


class ProcSampler:
    """Looks through /proc.

    Attributes:
        cost_s: processor time that looking took so far.
    """

    def __init__(self, pid: int, counters: GroupCounters, started: float, *, root: Path = Path("/")) -> None:
        """Begin to look.

        Args:
            pid: of the child, which leads a session of its own.
            counters: of its groups.
            started: moment of the monotonic clock that is second 0.
            root: where /proc lies.
        """
        self.cost_s = 0.0
        self._pid = pid
        self._counters = counters
        self._started = started
        self._proc = root / "proc"
        self._members = OpenFile(counters.folder / "cgroup.procs") if counters.folder else None
        self._known: dict[int, _Process] = {}
        self._gone_read, self._gone_cpu = 0, 0.0
        self._family = [pid]
        self._family_at = -_FAMILY_EVERY_S

    def sample(self) -> Sample | None:
        """Look once; None if no process of the child has memory."""
        before = time.thread_time()
        try:
            return self._look(time.monotonic() - self._started)
        finally:
            self.cost_s += time.thread_time() - before

    def family(self) -> list[int]:
        """The child and its children: the group's members, or else the processes of its session."""
        if self._members is not None and (text := self._members.read()):
            return [int(word) for word in text.split() if word.isdigit()]
        now = time.monotonic()
        if now - self._family_at >= _FAMILY_EVERY_S:
            self._family_at, self._family = now, session_members(self._pid, self._proc)
        return self._family or [self._pid]

    def close(self) -> None:
        """Close what is open."""
        for process in self._known.values():
            process.close()
        self._known.clear()
        if self._members is not None:
            self._members.close()

    def _look(self, at_s: float) -> Sample | None:
        total = dict.fromkeys((b"RssAnon", b"RssFile", b"RssShmem", b"VmSwap"), 0)
        cpu = self._counters.cpu_s()
        alive = False
        pids = self.family()
        for pid in pids:
            process = self._known.get(pid)
            if process is None:
                process = self._known[pid] = _Process(self._proc / str(pid))
            if (memory := process.memory()) is None:
                continue
            alive = True
            process.count(with_cpu=cpu is None)
            for name, value in memory.items():
                total[name] += value
        self._forget(pids)
        if not alive:
            return None
        group = self._counters.memory()
        read = [process.read_bytes for process in self._known.values() if process.read_bytes is not None]
        some, full = self._counters.stalls_s()
        if cpu is None:
            cpu = self._gone_cpu + sum(process.cpu_s for process in self._known.values())
        return Sample(
            at_s=at_s,
            anon_bytes=group.anon_bytes if group else total[b"RssAnon"],
            shmem_bytes=group.shmem_bytes if group else total[b"RssShmem"],
            swap_bytes=group.swap_bytes if group else total[b"VmSwap"],
            file_bytes=total[b"RssFile"],
            charged_bytes=self._counters.charged_bytes(),
            refaulted_bytes=group.refaulted_bytes if group else None,
            read_bytes=self._gone_read + sum(read) if read or self._gone_read else None,
            psi_some_s=some,
            psi_full_s=full,
            cpu_s=cpu,
        )

    def _forget(self, pids: list[int]) -> None:
        """Close what is gone, and keep what it had counted."""
        for pid in self._known.keys() - set(pids):
            process = self._known.pop(pid)
            self._gone_read += process.read_bytes or 0
            self._gone_cpu += process.cpu_s
            process.close()


class PsSampler:
    """Asks `ps`, on systems without /proc. It tells resident memory alone, which is taken as anonymous.

    Attributes:
        cost_s: processor time that looking took so far, the program's not counted.
    """

    def __init__(self, pid: int, started: float) -> None:
        """Begin to look."""
        self.cost_s = 0.0
        self._pid = pid
        self._started = started

    def sample(self) -> Sample | None:
        """Look once; None if the child is gone."""
        before = time.thread_time()
        try:
            asked = subprocess.run(
                ["ps", "-o", "rss=", "-p", str(self._pid)], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        finally:
            self.cost_s += time.thread_time() - before
        words = asked.stdout.split()
        if not words or not words[0].isdigit() or words[0] == "0":
            return None
        return Sample(time.monotonic() - self._started, int(words[0]) << 10, 0, 0, 0)

    def family(self) -> list[int]:
        """The child alone."""
        return [self._pid]

    def close(self) -> None:
        """Nothing is open."""


def make_sampler(pid: int, counters: GroupCounters, started: float) -> Sampler:
    """The one for this system."""
    if Path("/proc/self/status").exists():
        return ProcSampler(pid, counters, started)
    return PsSampler(pid, started)


def session_members(leader: int, proc: Path = Path("/proc")) -> list[int]:
    """Processes of the session that a process leads, itself included."""
    found = []
    try:
        names = [name for name in os.listdir(proc) if name.isdigit()]
    except OSError:
        return []
    for name in names:
        try:
            words = (proc / name / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if len(words) > 3 and words[3] == str(leader).encode():
            found.append(int(name))
    return sorted(found)
