"""The one place that owns the engine: requests wait here, and one thread answers them, several at a time.

    event loop: submit ─→ FairQueue ─→ worker thread: engine ─→ steps ─→ event loop: ticket

In: what is wanted. Out: tickets, on which steps arrive. Knows nothing of HTTP and of text formats.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from autoglm_edge.errors import EdgeError
from autoglm_edge.runtime.answer import Delta
from autoglm_edge.server.problem import ApiError, internal, problem_of

from .answering import Answering, Answers, Wanted
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
        self._next = 0
        self._open: dict[int, int] = {}  # answers that have begun: their index, by number
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

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancel.is_set()

    @property
    def begun(self) -> bool:
        """Whether all of its answers have begun."""
        return self._next == len(self._wanted)

    @property
    def ended(self) -> bool:
        """Whether all of its answers have ended."""
        return self.begun and not self._open

    def begin(self, answers: Answers, watcher: Watcher) -> int:
        """Begin its next answer and return the number; for the worker's thread."""
        if self.waited_s is None:
            self.waited_s = time.perf_counter() - self._submitted
            watcher.waited(self.waited_s)
        number = answers.begin(self._wanted[self._next], self._cancel)
        self._open[number] = self._next
        self._next += 1
        return number

    def take(self, number: int, delta: Delta, watcher: Watcher) -> None:
        """One of its answers goes on; for the worker's thread."""
        index = self._open[number]
        if delta.finish_reason is not None:
            del self._open[number]
            watcher.answered(delta)
        self.post(Step(index, delta))

    def leave(self, answers: Answers) -> list[int]:
        """Give up the answers that have not ended; their numbers. For the worker's thread."""
        numbers = [*self._open]
        self._open.clear()
        self._next = len(self._wanted)
        for number in numbers:
            answers.drop(number)
        return numbers

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
    """Answers requests in a thread of its own, as many at a time as the engine can."""

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
        self._running: list[Ticket] = []
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
        return len(self._running)

    def submit(self, name: str, wanted: Sequence[Wanted], client: str) -> Ticket:
        """Queue a request; from the event loop.

        Args:
            name: the request id.
            wanted: answers, which begin in this order.
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
        """Take no more requests, and send those away that wait; those that are answered go on."""
        with self._change:
            self._closed = True
            waiting = self._queue.clear()
            self._change.notify()
        for ticket in waiting:
            ticket.interrupt()

    def interrupt(self) -> None:
        """End the requests that are answered just now, within one run of a graph."""
        for ticket in [*self._running]:
            ticket.interrupt()

    def stop(self, timeout: float) -> bool:
        """End everything; True once the thread has ended, and the engine is nobody's."""
        self.refuse_more()
        self.interrupt()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        with self._engine.answers() as answers:
            owners: dict[int, Ticket] = {}
            while self._admit(answers, owners):
                try:
                    events = answers.step()
                # Whatever is the matter, it must not end the thread that serves all.
                except Exception as error:
                    for ticket in [*self._running]:
                        self._fail(ticket, error, answers, owners)
                    continue
                for number, event in events:
                    if number not in owners:  # of a request that failed with another of its answers
                        continue
                    ticket = owners[number]
                    if isinstance(event, Exception):
                        self._fail(ticket, event, answers, owners)
                        continue
                    ticket.take(number, event, self._watcher)
                    if event.finish_reason is not None:
                        del owners[number]
                    if ticket.ended:
                        self._end(ticket, None)

    def _admit(self, answers: Answers, owners: dict[int, Ticket]) -> bool:
        """Begin what there is room for; waits while there is nothing to do. False at the end."""
        while True:
            for ticket in [*self._running]:
                if ticket.cancelled and not ticket.begun:
                    self._drop(ticket, answers, owners)
            while answers.room > 0 and (waiting := self._next()) is not None:
                try:
                    owners[waiting.begin(answers, self._watcher)] = waiting
                except Exception as error:
                    self._fail(waiting, error, answers, owners)
            if answers.active:
                return True
            with self._change:
                while not len(self._queue) and not self._closed:
                    self._change.wait()
                if not len(self._queue) and self._closed:
                    return False

    def _next(self) -> Ticket | None:
        """The request whose next answer is to begin: one that has begun before one that waits."""
        with self._change:
            for ticket in self._running:
                if not ticket.begun:
                    return ticket
            waiting = self._queue.pop()
            if waiting is not None:
                self._running.append(waiting)
            return waiting

    def _fail(self, ticket: Ticket, error: Exception, answers: Answers, owners: dict[int, Ticket]) -> None:
        """End a request with an error; the others go on."""
        for number in ticket.leave(answers):
            owners.pop(number, None)
        if isinstance(error, EdgeError):
            problem = problem_of(error)
            if problem.status >= 500:
                LOG.error("%s: %s", ticket.name, type(error).__name__)
        else:
            LOG.error("%s failed:\n%s", ticket.name, trace_of(error))
            problem = internal(ticket.name)
        self._end(ticket, problem)

    def _drop(self, ticket: Ticket, answers: Answers, owners: dict[int, Ticket]) -> None:
        for number in ticket.leave(answers):
            owners.pop(number, None)
        self._end(ticket, None)

    def _end(self, ticket: Ticket, problem: ApiError | None) -> None:
        with self._change:
            if ticket in self._running:
                self._running.remove(ticket)
        ticket.post(problem)


def stopping() -> ApiError:
    """The server is going down."""
    return ApiError(
        503,
        "the server is stopping",
        code="server_stopping",
        headers={"retry-after": "5", "connection": "close"},
    )


def queue_full(most: int) -> ApiError:
    """As many requests are there as may be."""
    return ApiError(
        429,
        f"{most} requests are waiting or being answered, more are not taken; try again later",
        code="queue_full",
        headers={"retry-after": "1"},
    )


def trace_of(error: BaseException) -> str:
    """Where an error happened and of which type it is; not its message, which may hold a user's text."""
    lines = traceback.format_tb(error.__traceback__)
    return "".join([*lines, type(error).__name__])
