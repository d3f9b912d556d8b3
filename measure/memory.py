"""Memory of a process by phase: anonymous, mapped from files, swapped; the peaks of each.

In: a process id. Out: bytes. On Linux from /proc/PID/status, some 25 times a second; elsewhere the system
tells at most the largest resident size so far, and what is not known is None, never 0. Knows nothing of what
the process does.

Anonymous pages (RssAnon) are what a device must find room for; pages mapped from files (RssFile) are clean
and the system may drop them at any time; swapped pages (VmSwap) were anonymous.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType

from autoglm_edge.errors import RequestError

INTERVAL_SECONDS = 0.04
_FIELDS = {
    "VmRSS": "rss_bytes",
    "RssAnon": "anon_bytes",
    "RssFile": "file_bytes",
    "RssShmem": "shmem_bytes",
    "VmSwap": "swap_bytes",
}
BETWEEN = "between"
"""The phase of what happens outside of every phase."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a process, now or at the peak of a phase; None is not known on this system.

    Attributes:
        rss_bytes: resident, all kinds.
        anon_bytes: resident and anonymous.
        file_bytes: resident and mapped from files.
        shmem_bytes: resident and shared.
        swap_bytes: anonymous pages that were swapped out.
    """

    rss_bytes: int | None = None
    anon_bytes: int | None = None
    file_bytes: int | None = None
    shmem_bytes: int | None = None
    swap_bytes: int | None = None

    @property
    def known(self) -> bool:
        """Whether the system told anything."""
        return any(value is not None for value in asdict(self).values())

    def peak(self, other: Memory) -> Memory:
        """The larger of each kind; kinds need not peak at one moment."""

        def larger(name: str) -> int | None:
            found = [value for item in (self, other) if (value := getattr(item, name)) is not None]
            return max(found, default=None)

        return Memory(**{field.name: larger(field.name) for field in fields(Memory)})

    def to_json(self) -> dict[str, int | None]:
        """Bytes by name."""
        return asdict(self)


def read_memory(pid: int | None = None) -> Memory:
    """Memory of a process now; of this one if none is named.

    Returns:
        Nothing known (`Memory.known` is False) if the process is gone, or is another one on a system without
        /proc.
    """
    try:
        lines = Path(f"/proc/{'self' if pid is None else int(pid)}/status").read_text().splitlines()
    except OSError:
        return _largest_resident() if pid is None else Memory()
    found: dict[str, int] = {}
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if name in _FIELDS and words and words[0].isdigit():
            found[_FIELDS[name]] = 1024 * int(words[0])
    return Memory(**found)


def _largest_resident() -> Memory:
    """What a system without /proc tells: the largest resident size of this process so far."""
    try:
        import resource
    except ImportError:
        return Memory()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Memory(rss_bytes=largest if sys.platform == "darwin" else 1024 * largest)


class MemorySampler:
    """Watches a process from a thread. A context manager.

    with MemorySampler() as memory:
        with memory.phase("load"):
            ...
    memory.peaks["load"].anon_bytes
    """

    def __init__(self, pid: int | None = None, *, interval: float = INTERVAL_SECONDS) -> None:
        """Prepare.

        Args:
            pid: process to watch; None is this one.
            interval: seconds between samples, 0.001 to 1.

        Raises:
            RequestError: the interval is out of range.
        """
        if not 0.001 <= interval <= 1:
            raise RequestError(f"the interval is {interval!r} s, must be 0.001 to 1")
        self.peaks: dict[str, Memory] = {}
        self._pid = pid
        self._interval = interval
        self._phase = BETWEEN
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="memory sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in here counts as the phase `name`, of which beginning and end are always seen."""
        before, self._phase = self._phase, name
        self.sample()
        try:
            yield
        finally:
            self.sample()
            self._phase = before

    def sample(self) -> Memory:
        """Look once, and count it."""
        with self._lock:
            now = read_memory(self._pid)
            if now.known:
                self.peaks[self._phase] = now.peak(self.peaks.get(self._phase, now))
        return now

    @property
    def peak(self) -> Memory:
        """Over all phases."""
        most = Memory()
        for value in list(self.peaks.values()):
            most = most.peak(value)
        return most

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.sample()


@dataclass(frozen=True)
class Watched:
    """What a command did.

    Attributes:
        returncode: exit status.
        stdout: all of it.
        seconds: wall time.
        peak: largest value seen of each kind of memory; children of the command are not in it.
    """

    returncode: int
    stdout: str
    seconds: float
    peak: Memory


def watch(command: Sequence[str], *, interval: float = INTERVAL_SECONDS) -> Watched:
    """Run `command` to its end and watch its memory; its stderr goes through.

    Args:
        command: program and arguments.
        interval: seconds between samples.

    Raises:
        RequestError: the program cannot be started.
    """
    started = time.perf_counter()
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
    except OSError as error:
        raise RequestError(f"{command[0]} cannot be started: {error.strerror or error}") from error
    with MemorySampler(process.pid, interval=interval) as memory:
        stdout, _ = process.communicate()
    return Watched(process.returncode, stdout, time.perf_counter() - started, memory.peak)
