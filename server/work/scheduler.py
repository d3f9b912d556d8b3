"""The one place that owns the engine: requests wait here, and one thread answers them.

    event loop: submit ─→ FairQueue ─→ worker thread: engine ─→ steps ─→ event loop: ticket

In: what is wanted. Out: tickets, on which steps arrive. Knows nothing of HTTP and of text formats; a
scheduler that answers several requests at once can stand in its place, tickets stay what they are.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from autoglm_edge.errors import EdgeError
from autoglm_edge.runtime.answer import Delta
from autoglm_edge.server.problem import ApiError, internal, problem_of

from .answering import Answering, Wanted
from .fair_queue import FairQueue

LOG = logging.getLogger("autoglm_edge.server")


@dataclass(frozen=True)
class Step:
    """One delta of one of the answers of a request.

    Attributes:
        index: of the answer, from 0.
        delta: what it adds.
    """

    index: int
    delta: Delta


class Watcher(Protocol):
    """Is told what happens; called from the worker's thread."""

    def waited(self, seconds: float) -> None:
        """A request begins after so long in the queue."""

    def answered(self, delta: Delta) -> None:
        """An answer has ended with this delta."""


class Ticket:
    """A request that waits or is answered. Belongs to the event loop that made it.

    Attributes:
        name: the request id, for the log.
        waited_s: time in the queue; None while it waits.
    """

    def __init__(self, name: str, wanted: Sequence[Wanted], scheduler: Scheduler) -> None:
        self.name = name
        self.waited_s: float | None = None
        self._wanted = tuple(wanted)
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Step | ApiError | None] = asyncio.Queue()
        self._cancel = threading.Event()
        self._submitted = time.perf_counter()

    async def next(self) -> Step | None:
        """The next step; None after the last one, and once it is cancelled.

        Raises:
            ApiError: it failed.
        """
        event = await self._events.get()
        if isinstance(event, ApiError):
            self._events.put_nowait(None)
            raise event
        if event is None:
            self._events.put_nowait(None)
        return event

    def cancel(self) -> None:
        """Nobody waits for it any more: out of the queue, or ended within one run of a graph."""
        self._cancel.set()
        self._scheduler.forget(self)
        self._events.put_nowait(None)

    def run(self, engine: Answering, watcher: Watcher) -> None:
        """Give all answers; for the worker's thread."""
        self.waited_s = time.perf_counter() - self._submitted
        watcher.waited(self.waited_s)
        for index, wanted in enumerate(self._wanted):
            if self._cancel.is_set():
                return
            with closing(engine.answer_wanted(wanted, self._cancel)) as deltas:
                for delta in deltas:
                    if delta.finish_reason is not None:
                        watcher.answered(delta)
                    self.post(Step(index, delta))

    def post(self, event: Step | ApiError | None) -> None:
        """Hand something to the event loop, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody listens
            self._cancel.set()

    def interrupt(self) -> None:
        """End it for a reason of the server's own; from any thread."""
        self.post(stopping())
        self._cancel.set()


class Scheduler:
    """Answers requests one after the other, in a thread of its own."""

    def __init__(self, engine: Answering, watcher: Watcher) -> None:
        """Start the thread.

        Args:
            engine: nobody else asks it for answers.
            watcher: is told what happens.
        """
        self._engine = engine
        self._watcher = watcher
        self._queue: FairQueue[Ticket] = FairQueue()
        self._change = threading.Condition()
        self._running: Ticket | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        with self._change:
            return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that are answered just now."""
        return int(self._running is not None)

    def submit(self, name: str, wanted: Sequence[Wanted], client: str) -> Ticket:
        """Queue a request; from the event loop.

        Args:
            name: the request id.
            wanted: answers, which are given in this order.
            client: with whom it takes turns.

        Raises:
            ApiError: the server is stopping.
        """
        ticket = Ticket(name, wanted, self)
        with self._change:
            if self._closed:
                raise stopping()
            self._queue.push(client, ticket)
            self._change.notify()
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """Take a ticket out of the queue, if it waits there."""
        with self._change:
            self._queue.remove(ticket)

    def refuse_more(self) -> None:
        """Take no more requests, and send those away that wait; the one that is answered goes on."""
        with self._change:
            self._closed = True
            waiting = self._queue.clear()
            self._change.notify()
        for ticket in waiting:
            ticket.interrupt()

    def interrupt(self) -> None:
        """End the request that is answered just now, within one run of a graph."""
        running = self._running
        if running is not None:
            running.interrupt()

    def stop(self, timeout: float) -> bool:
        """End everything; True once the thread has ended, and the engine is nobody's."""
        self.refuse_more()
        self.interrupt()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._change:
                self._running = None
                while not len(self._queue) and not self._closed:
                    self._change.wait()
                ticket = self._queue.pop()
                if ticket is None:
                    return
                self._running = ticket
            self._serve(ticket)

    def _serve(self, ticket: Ticket) -> None:
        end: ApiError | None = None
        try:
            ticket.run(self._engine, self._watcher)
        except EdgeError as error:
            end = problem_of(error)
            if end.status >= 500:
                LOG.error("%s: %s", ticket.name, type(error).__name__)
        # One request, whatever it sets off in a graph or a library, must not end the thread that serves all.
        except Exception as error:
            LOG.error("%s failed:\n%s", ticket.name, trace_of(error))
            end = internal(ticket.name)
        ticket.post(end)


def stopping() -> ApiError:
    """The server is going down."""
    return ApiError(
        503,
        "the server is stopping",
        code="server_stopping",
        headers={"retry-after": "5", "connection": "close"},
    )


def trace_of(error: BaseException) -> str:
    """Where an error happened and of which type it is; not its message, which may hold a user's text."""
    lines = traceback.format_tb(error.__traceback__)
    return "".join([*lines, type(error).__name__])
