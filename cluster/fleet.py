"""The replicas of a server: started, watched, started again when they die, ended.

In: a command that starts one. Out: which replicas can be asked, and where. Knows nothing of requests.

The first replica is started alone: what it prepares for this machine, the others find. Each is in a session
of its own, so that Ctrl-C reaches the parent only, and holds a pipe, so that it ends when the parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autoglm_edge.errors import DeviceError

from .exchange import ReplicaLostError, exchange

LOG = logging.getLogger("autoglm_edge.server")

POLL_SECONDS = 0.2
"""Between two questions to a replica that is loading."""
HEALTH_SECONDS = 5.0
"""Between two questions to one that is ready, and for its answer."""
MISSES = 3
"""Questions without an answer, after which a replica is ended and started again."""
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
"""Before a replica that dies again and again is started again."""


@dataclass(frozen=True)
class Place:
    """What one replica is started with.

    Attributes:
        arguments: of the command, beside those that all have in common.
        environment: variables of its own.
    """

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Replica:
    """One of them.

    Attributes:
        index: from 0.
        socket: where it listens.
        place: what it is started with.
        ready: whether it can be asked.
        load: requests that it has; counted by whoever asks.
        starts: how often it was started.
        process: the running one.
    """

    index: int
    socket: Path
    place: Place
    ready: bool = False
    load: int = 0
    starts: int = 0
    process: Process | None = None


class Fleet:
    """All replicas; belongs to an event loop.

    Attributes:
        replicas: in order.
        error: why the first one could not be started; None if it was.
    """

    def __init__(
        self,
        command: Sequence[str],
        places: Sequence[Place],
        folder: Path,
        *,
        restarted: Callable[[int], None] = lambda index: None,
        failed: Callable[[], None] = lambda: None,
        told: Callable[[str], None] = lambda text: None,
        health_s: float = HEALTH_SECONDS,
        first_pause_s: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        """Nothing is started yet.

        Args:
            command: starts a replica; gets `--replica-socket` and its path.
            places: one for each.
            folder: for sockets; nobody else may look into it.
            restarted: called with the number of a replica that lost its caches.
            failed: called if a replica ends before it was ever ready; `error` says why.
            told: gets sentences about what happens.
            health_s: between two questions to a ready one.
            first_pause_s: before a dead one is started again; doubled each time.
        """
        self.replicas = [
            Replica(index, folder / f"{index}.sock", place) for index, place in enumerate(places)
        ]
        self.error: DeviceError | None = None
        self._command = tuple(command)
        self._restarted = restarted
        self._failed = failed
        self._told = told
        self._health_s = health_s
        self._first_pause_s = first_pause_s
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> list[Replica]:
        """Those that can be asked."""
        return [replica for replica in self.replicas if replica.ready]

    def start(self) -> None:
        """Begin to start them; returns at once."""
        first = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._tend(replica, first), name=f"replica {replica.index}")
            for replica in self.replicas
        ]

    def refuse_more(self) -> None:
        """Tell all to end: what waits there is sent away, answers under way may end."""
        self._stopping = True
        for replica in self.replicas:
            _signal(replica, signal.SIGTERM)

    async def stop(self, timeout: float) -> None:
        """End all of them; those that take longer than `timeout` seconds are killed."""
        self.refuse_more()
        running = [replica.process.wait() for replica in self.replicas if replica.process is not None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await asyncio.gather(*running)
        for replica in self.replicas:
            _signal(replica, signal.SIGKILL)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for replica in self.replicas:
            if replica.process is not None:
                await replica.process.wait()

    async def _tend(self, replica: Replica, first: asyncio.Event) -> None:
        if replica.index:
            await first.wait()
        pause = self._first_pause_s
        while not self._stopping:
            try:
                process = await self._start(replica)
            except OSError as error:  # no memory, no more processes: it may get better
                LOG.error("replica %d cannot be started: %s", replica.index, error.strerror or error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            watch = asyncio.create_task(self._watch(replica, process, first))
            status = await process.wait()
            watch.cancel()
            was_ready, replica.ready = replica.ready, False
            await asyncio.gather(watch, return_exceptions=True)
            if self._stopping:
                return
            if replica.starts == 1 and not was_ready:
                self.error = DeviceError(
                    f"replica {replica.index} ended with status {status} before it was ready; what it said "
                    "stands above"
                )
                self._failed()
                return
            self._restarted(replica.index)
            pause = self._first_pause_s if was_ready else min(2 * pause, LONGEST_PAUSE_SECONDS)
            self._told(f"Replica {replica.index} ended with status {status}, starting it again")
            await asyncio.sleep(pause)

    async def _start(self, replica: Replica) -> Process:
        replica.socket.unlink(missing_ok=True)
        arguments = (*self._command, *replica.place.arguments, "--replica-socket", str(replica.socket))
        replica.process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=PIPE,
            env={**os.environ, **replica.place.environment},
            start_new_session=True,
        )
        replica.starts += 1
        return replica.process

    async def _watch(self, replica: Replica, process: Process, first: asyncio.Event) -> None:
        """Notice when it is ready, and when it no longer answers."""
        while not await self._is_well(replica, seconds=self._health_s):
            await asyncio.sleep(POLL_SECONDS)
        replica.ready = True
        first.set()
        self._told(f"Replica {replica.index} is ready")
        misses = 0
        while misses < MISSES:
            await asyncio.sleep(self._health_s)
            misses = 0 if await self._is_well(replica, seconds=self._health_s) else misses + 1
        LOG.error("replica %d does not answer and is ended", replica.index)
        process.kill()

    async def _is_well(self, replica: Replica, *, seconds: float) -> bool:
        try:
            async with (
                asyncio.timeout(seconds),
                exchange(replica.socket, "GET", b"/health", (), b"") as asked,
            ):
                return (await asked.head()).status == 200
        except (ReplicaLostError, TimeoutError):
            return False


def _signal(replica: Replica, number: signal.Signals) -> None:
    process = replica.process
    if process is not None and process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
