"""One child of a run: started behind `launch.py`, watched to its end, killed with all that it started.

In: a command, the enforcement that holds it, times. Out: its samples, reports and end, as a `Trace`. The loop
is one thread: it sleeps until a pipe has something, the child has ended, or a sample is due.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Literal

from autoglm_edge.android_sim.limits.counters import GroupCounters
from autoglm_edge.android_sim.limits.enforcement import Enforcement
from autoglm_edge.android_sim.limits.throttle import Throttle
from autoglm_edge.android_sim.trace import Ending, KilledBy, Sample, Trace
from autoglm_edge.errors import SimulationError

from .reports import REPORT_VARIABLE, Reports, says_memory
from .sampler import Sampler, make_sampler, session_members

STDERR_BYTES = 1 << 16
"""Kept of what the child writes there last."""
MESSAGE_LINES = 3
_PIPE_BYTES = 1 << 16
_DEATH_S = 30.0
"""How long a killed child may take to be gone: one that waits for storage goes when its read is through."""
_OWN_FAULTS = tuple(
    getattr(signal, name)
    for name in ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS")
    if hasattr(signal, name)
)
"""Signals that a program brings on itself."""


class ChildProcess:
    """One child, from its start to its end."""

    def __init__(self, enforcement: Enforcement, throttle: Throttle) -> None:
        """Prepare; nothing is started.

        Args:
            enforcement: entered already.
            throttle: whose groups the child joins, too.
        """
        self._enforcement = enforcement
        self._throttle = throttle
        self._samples: list[Sample] = []
        self._stderr = b""
        self._ended_by: Literal["", "timeout", "interrupted", "watchdog"] = ""
        self._counters: GroupCounters | None = None
        self._sampler: Sampler | None = None
        self._selector = selectors.DefaultSelector()
        self._open: list[int] = []
        self._started = self._sampling_from = time.monotonic()
        self._reports = Reports(self._started)
        self._child: subprocess.Popen[bytes] | None = None
        self._seconds = self._sampling_share = self._interval_s = 0.0
        self._oom_kills, self._hit_limit = 0, False
        self._peak_charged: int | None = None

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            raise SimulationError("the child was not started; this is a defect, report it")
        return self._child

    def start(self, command: Sequence[str], stdin: int | IO[bytes]) -> None:
        """Start the child and listen to it.

        Raises:
            SimulationError: the system refuses.
        """
        report_in, report_out = os.pipe()
        keep_in, keep_out = os.pipe()
        self._open += [report_in, keep_out]
        entry = self._enforcement.entry.joined_by(self._throttle.groups)
        self._started = time.monotonic()
        self._reports = Reports(self._started)
        try:
            self._child = subprocess.Popen(
                entry.command(command, report=report_out, keep=keep_in),
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(report_out, keep_in),
                start_new_session=True,
                env={**os.environ, REPORT_VARIABLE: str(report_out)},
            )
        except OSError as error:
            raise SimulationError(f"the child cannot be started ({error.strerror or error})") from error
        finally:
            os.close(report_out)
            os.close(keep_in)
        if entry.scope is None:
            self._counters = self._enforcement.entered(self._child.pid, None)
        self._listen(report_in, self._reports.feed)
        if self._child.stderr is not None:
            self._listen(self._child.stderr.fileno(), self._take_stderr)
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # then the end is seen a sample late
                descriptor = os.pidfd_open(self._child.pid)
                self._open.append(descriptor)
                self._selector.register(descriptor, selectors.EVENT_READ, None)

    def watch(self, *, timeout_s: float, interval_s: float, stop: threading.Event) -> None:
        """Sample and listen until the child has ended, and kill what is left of it.

        Args:
            timeout_s: from its start, after which it is killed.
            interval_s: between samples.
            stop: ends it when it is set.

        Raises:
            SimulationError: it does not go when it is killed.
        """
        self._interval_s = interval_s
        deadline = self._started + timeout_s
        tick = self._started
        try:
            while not self._has_ended():
                now = time.monotonic()
                if now >= deadline or stop.is_set():
                    self._ended_by = "timeout" if now >= deadline else "interrupted"
                    break
                if now >= tick:
                    tick = max(tick + interval_s, now)
                    self._look(now)
                    if self._ended_by:
                        break
                self._hear(max(0.0, min(tick, deadline) - time.monotonic()))
        finally:
            self._seconds = time.monotonic() - self._started
            self._end()

    def trace(self, notes: Sequence[str]) -> Trace:
        """What was seen.

        Raises:
            SimulationError: the command never began, for another reason than its limits.
        """
        reports, code = self._reports, self._process.returncode
        launch = reports.launch or {}
        killed_early = self._oom_kills > 0 or self._ended_by
        if reports.launch_error or (reports.launch is None and not killed_early):
            why = reports.launch_error or self._last_words() or f"it ended with status {code}"
            raise SimulationError(
                f"the child never began inside its limits: {why}; choose another enforcement"
            )
        ending, killed_by = self._ending(code)
        completed = ending == "exited" and code == 0
        kills = self._oom_kills
        words = self._stderr.decode("utf-8", "replace")
        enforced = self._enforcement.describe()
        if launch.get("open_door"):
            notes = [*notes, f"the child could lift its own limits here: {launch['open_door']}"]
        return Trace(
            samples=tuple(self._samples),
            phases=reports.phases(self._seconds, completed=completed),
            ending=ending,
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            oom_kills=kills,
            message=reports.error or ("" if completed else self._last_words()),
            result=reports.result,
            enforced=replace(enforced, notes=(*enforced.notes, *notes)),
            interval_s=self._interval_s,
            sampling_share=self._sampling_share,
            seconds=self._seconds,
            killed_by=killed_by,
            alloc_failed=not completed and kills == 0 and (reports.memory or says_memory(words)),
            peak_charged_bytes=self._peak_charged,
        )

    def close(self) -> None:
        """Close what is open, and kill the child if something went wrong before its end."""
        child = self._child
        if child is not None and child.returncode is None:
            with contextlib.suppress(SimulationError):
                self._end()
        self._selector.close()
        if self._sampler is not None:
            self._sampler.close()
        if self._counters is not None:
            self._counters.close()
        while self._open:
            os.close(self._open.pop())
        if child is not None and child.stderr is not None:
            child.stderr.close()

    def _look(self, now: float) -> None:
        """Take a sample, kill for a mechanism that cannot, and move the quota."""
        launch = self._reports.launch
        if launch is None:
            return
        if self._sampler is None:
            self._sampler = make_sampler(self._process.pid, self._scope_counters(), self._started)
            self._sampling_from = now
        sample = self._sampler.sample()
        if sample is None:
            return
        self._samples.append(sample)
        if self._enforcement.is_exceeded(sample):
            self._ended_by = "watchdog"
        self._throttle.at(now - self._started)

    def _scope_counters(self) -> GroupCounters:
        """The counters of the groups; where the child made its own, it has said so in its launch."""
        if self._counters is None:
            group = (self._reports.launch or {}).get("group")
            self._counters = self._enforcement.entered(self._process.pid, Path(group) if group else None)
        return self._counters

    def _hear(self, seconds: float) -> None:
        """Wait for reports, words on stderr, or the end."""
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                continue
            data = os.read(key.fd, _PIPE_BYTES)
            if data:
                key.data(data)
            else:
                self._selector.unregister(key.fd)

    def _hear_all(self) -> None:
        """What is left in the pipes; their writers are gone, so that it ends."""
        for key in list(self._selector.get_map().values()):
            with contextlib.suppress(BlockingIOError):
                while key.data is not None and (data := os.read(key.fd, _PIPE_BYTES)):
                    key.data(data)

    def _listen(self, descriptor: int, take: Callable[[bytes], None]) -> None:
        os.set_blocking(descriptor, False)
        self._selector.register(descriptor, selectors.EVENT_READ, take)

    def _take_stderr(self, data: bytes) -> None:
        self._stderr = (self._stderr + data)[-STDERR_BYTES:]

    def _has_ended(self) -> bool:
        """Whether the child has ended; it is not buried yet, so that its process group is still its own."""
        if not hasattr(os, "waitid"):
            return self._process.poll() is not None
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _end(self) -> None:
        """Kill the child and its children, and read what only counts up to here."""
        family = session_members(self._process.pid)
        if self._sampler is not None:
            family += self._sampler.family()
        if self._ended_by or not self._has_ended():
            # First the child itself, so that it is what ends, and not what it makes of its children's deaths.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pid in set(family) - {os.getpid(), self._process.pid}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self._enforcement.kill()
        try:
            self._process.wait(_DEATH_S)
        except subprocess.TimeoutExpired as error:
            raise SimulationError(
                f"the child {self._process.pid} does not go when it is killed; it waits for the system"
            ) from error
        self._hear_all()
        counters = self._scope_counters() if self._reports.launch is not None else self._counters
        self._oom_kills = counters.oom_kills() if counters else 0
        self._hit_limit = counters.hit_limit() if counters else False
        self._peak_charged = counters.peak_bytes() if counters else None
        spent = self._seconds - (self._sampling_from - self._started) if self._sampler else 0.0
        self._sampling_share = self._sampler.cost_s / spent if self._sampler and spent > 0 else 0.0

    def _ending(self, code: int) -> tuple[Ending, KilledBy | None]:
        """How the child ended, and who killed it."""
        if self._ended_by == "watchdog":
            return "killed", "watchdog"
        if self._ended_by in ("timeout", "interrupted"):
            return ("timeout" if self._ended_by == "timeout" else "interrupted"), None
        by_limit = self._oom_kills > 0 and self._hit_limit
        if code >= 0:
            # A shell whose program was killed ends by itself, with a status that says so.
            return "exited", "limit" if by_limit and code != 0 else None
        if by_limit and -code == signal.SIGKILL:
            return "killed", "limit"
        return "killed", None if -code in _OWN_FAULTS else "outside"

    def _last_words(self) -> str:
        """The end of what the child wrote to stderr, in one line."""
        lines = [line.strip() for line in self._stderr.decode("utf-8", "replace").splitlines()]
        lines = [line for line in lines if line.strip("^~ ")]  # Python underlines where it failed
        text = " / ".join(lines[-MESSAGE_LINES:])[-600:]
        return "".join(character if character.isprintable() else " " for character in text)
