"""Runs a command, or the runtime's own child, inside the limits, and writes down what happens.

In: a job or any command, a budget and an enforcement. Out: a `Trace`. What this made is gone when it returns
or raises: processes, groups, swap, settings; Ctrl-C and SIGTERM included. Judges nothing.

    limits ─ throttle, read-ahead ─ model out of the page cache ─ launch.py ─ the command
                                                                     │ reports, stderr
    sample, report, look for the end, sample, … ─────────────────────┘
    kill what is left ─ read the last counters ─ Trace ─ remove everything
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.limits.enforcement import Enforcement, choose_enforcement
from autoglm_edge.android_sim.limits.page_cache import drop_files
from autoglm_edge.android_sim.limits.readahead import ReadAhead
from autoglm_edge.android_sim.limits.throttle import Throttle
from autoglm_edge.android_sim.trace import Trace
from autoglm_edge.errors import SimulationError

from .child_process import ChildProcess
from .job import Job
from .sampler import INTERVAL_S, LEAST_INTERVAL_S, MOST_INTERVAL_S


@dataclass(frozen=True)
class RunOptions:
    """How a run is watched.

    Attributes:
        timeout_s: wall time after which the child is killed.
        interval_s: between samples, 0.02 to 1.
        cold: files and folders dropped from the page cache first, beside those of a job.
        set_readahead: hold the disk of the model to the device's read-ahead, where this user may.
        throttle_cpu: move a quota along the device's thermal curve.
        throttle_storage: hold reads to the speed of the device's storage.

    Raises:
        SimulationError: a value is out of range.
    """

    timeout_s: float = 900.0
    interval_s: float = INTERVAL_S
    cold: tuple[Path, ...] = ()
    set_readahead: bool = True
    throttle_cpu: bool = False
    throttle_storage: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < 1e7:
            raise SimulationError(f"the timeout is {self.timeout_s} s, must be above 0")
        if not LEAST_INTERVAL_S <= self.interval_s <= MOST_INTERVAL_S:
            raise SimulationError(
                f"the interval between samples is {self.interval_s} s, must be {LEAST_INTERVAL_S} to "
                f"{MOST_INTERVAL_S}"
            )


def run_inside(
    what: Job | Sequence[str],
    budget: Budget,
    enforcement: Enforcement | None = None,
    options: RunOptions | None = None,
    *,
    stop: threading.Event | None = None,
) -> Trace:
    """Run to the end, to the limit or to the timeout.

    Args:
        what: a job of the runtime's own child, or a program with its arguments.
        budget: what it may have.
        enforcement: not entered yet; default the best one that this host offers.
        options: default RunOptions().
        stop: ends the run when it is set.

    Returns:
        What was seen. Whatever a child does to itself is in the trace, not an error.

    Raises:
        SimulationError: limits cannot be made here, or the command cannot be started inside them.
        BundleError: a job's bundle is not usable.
        KeyboardInterrupt: Ctrl-C; everything is removed before.
    """
    if sys.platform == "win32":
        raise SimulationError(
            "a run needs a system with processes that can be limited or watched, which Windows does not "
            "offer here; predict without a run instead"
        )
    options = options or RunOptions()
    chosen = enforcement or choose_enforcement("auto", budget)
    with _signals_raise(), chosen, contextlib.ExitStack() as made:
        throttle = Throttle(budget)
        made.callback(throttle.close)
        notes = _surroundings(what, budget, chosen, options, throttle, made)
        command, stdin = _command(what)
        if not isinstance(stdin, int):
            made.callback(stdin.close)
        child = ChildProcess(chosen, throttle)
        made.callback(child.close)
        child.start(command, stdin)
        child.watch(
            timeout_s=options.timeout_s, interval_s=options.interval_s, stop=stop or threading.Event()
        )
        return child.trace(notes)


def _surroundings(
    what: Job | Sequence[str],
    budget: Budget,
    enforcement: Enforcement,
    options: RunOptions,
    throttle: Throttle,
    made: contextlib.ExitStack,
) -> list[str]:
    """Set what the child finds around it; returns notes on what is not as on the device."""
    notes: list[str] = []
    cold = [*(what.files() if isinstance(what, Job) else ()), *options.cold]
    if options.throttle_cpu:
        throttle.open_cpu(enforcement.journal, enforcement.group)
    if cold and options.throttle_storage:
        throttle.open_storage(cold[0], enforcement.journal, enforcement.group)
    if cold:
        ahead = ReadAhead(cold[0], enforcement.journal)
        made.callback(ahead.restore)
        now = ahead.bytes
        if options.set_readahead:
            notes.append(ahead.set(budget.readahead_bytes))
        elif now is not None and now != budget.readahead_bytes:
            notes.append(
                f"this disk reads {now >> 10} KiB ahead, the device {budget.readahead_bytes >> 10} KiB"
            )
        notes.append(drop_files(cold).note)
    return [note for note in (*notes, *throttle.notes) if note]


def _command(what: Job | Sequence[str]) -> tuple[list[str], int | IO[bytes]]:
    """The command, and what it has as stdin: a job goes there, so that no file of it can be left behind.

    Raises:
        SimulationError: it is empty, or the job cannot be written.
    """
    if not isinstance(what, Job):
        if not what or not all(isinstance(word, str) and "\0" not in word for word in what):
            raise SimulationError(f"the command is {list(what)!r}, must be a program and its arguments")
        return list(what), subprocess.DEVNULL
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115  the child reads it; the caller closes it
        file.write(what.to_json().encode())
        file.seek(0)
    except OSError as error:
        raise SimulationError(
            f"the job cannot be written to {tempfile.gettempdir()} ({error.strerror or error}); free some "
            "disk, or set TMPDIR to another folder"
        ) from error
    return [sys.executable, "-m", "autoglm_edge.android_sim.run.child", "-"], file


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process by way of an exception, as Ctrl-C does, so that all is removed.

    Signals can be handled in the main thread alone; elsewhere, and where somebody handles them already, they
    are left as they are.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _raise_exit)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
