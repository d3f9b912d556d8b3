"""Responses that come as the engine works: a stream of events, or one document after a while.

In: a ticket and its telling. Out: ASGI messages. A client that goes away is noticed while nothing is sent,
and its work ends. A client that reads nothing is left alone after a while.

Long before the first token nothing would flow, and clients give up and post again. So a stream gets comments,
which clients skip, and a document that takes long begins with line breaks, which JSON allows. From then on
the status is said: a failure later ends the connection in the middle, never as an answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from autoglm_edge.server.asking.body import Receive
from autoglm_edge.server.problem import ApiError
from autoglm_edge.server.work.scheduler import Step, Ticket

from .forms import Telling

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PING_SECONDS = 5.0
"""Between two signs of life."""
PATIENCE_SECONDS = 20.0
"""Before a document gets its first line break: until then a failure still has a status of its own."""
JSON_TYPE = "application/json"
EVENTS_TYPE = "text/event-stream; charset=utf-8"


class CutOffError(Exception):
    """The response cannot be finished; the connection is to be cut."""


def to_bytes(document: Any) -> bytes:
    """JSON as UTF-8; a lone surrogate, which only a client can have brought, becomes an escape."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


class Reply:
    """A response as an ASGI application."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str], media: str = JSON_TYPE) -> None:
        self.status = status
        self.body = body
        self.headers = dict(headers)
        self.media = media

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send it."""
        headers = {"content-type": self.media, "content-length": str(len(self.body))} | self.headers
        await send(_start(self.status, headers))
        body = b"" if scope.get("method") == "HEAD" else self.body
        await send({"type": "http.response.body", "body": body, "more_body": False})


def document(value: Any, status: int = 200) -> Reply:
    """A JSON document."""
    return Reply(status, to_bytes(value), {})


def problem_reply(problem: ApiError) -> Reply:
    """A problem as a response."""
    return Reply(problem.status, to_bytes(problem.body), problem.headers)


class _Live:
    """What both kinds of live responses share: a ticket, a client that may go away."""

    def __init__(
        self, ticket: Ticket, telling: Telling, *, ping_s: float = PING_SECONDS, send_s: float = 60.0
    ) -> None:
        """Begin.

        Args:
            ticket: where steps come from.
            telling: what is said of them.
            ping_s: between two signs of life.
            send_s: after which a client that takes no bytes is left alone.
        """
        self._ticket = ticket
        self._telling = telling
        self._ping_s = ping_s
        self._send_s = send_s
        self._gone = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send it, as long as there is a client; whatever happens, its work ends with it."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await self._tell(send)
        finally:
            self._ticket.cancel()
            watcher.cancel()

    async def _tell(self, send: Send) -> None:
        raise NotImplementedError

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._ticket.cancel()

    async def _next(self, seconds: float) -> tuple[Step | None, bool]:
        """The next step, and whether time was up before it came."""
        try:
            return await asyncio.wait_for(self._ticket.next(), seconds), False
        except TimeoutError:
            return None, True

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._send_s):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise CutOffError from None


class EventStream(_Live):
    """Server-sent events, a chunk per step that has text."""

    def __init__(
        self,
        ticket: Ticket,
        telling: Telling,
        *,
        include_usage: bool,
        ping_s: float = PING_SECONDS,
        send_s: float = 60.0,
    ) -> None:
        """Begin.

        Args:
            ticket: where steps come from.
            telling: what is said of them.
            include_usage: whether a last chunk has the counts.
            ping_s: between two comments.
            send_s: after which a client that takes no bytes is left alone.
        """
        super().__init__(ticket, telling, ping_s=ping_s, send_s=send_s)
        self._include_usage = include_usage

    async def _tell(self, send: Send) -> None:
        headers = {"content-type": EVENTS_TYPE, "cache-control": "no-cache", "x-accel-buffering": "no"}
        await send(_start(200, headers))
        await self._write(send, b": accepted\n\n")
        last: dict[str, Any] = {}
        try:
            while True:
                step, waiting = await self._next(self._ping_s)
                if self._gone:
                    return
                if waiting:
                    word = b": waiting\n\n" if self._ticket.waited_s is None else b": working\n\n"
                    await self._write(send, word)
                    continue
                if step is None:
                    break
                chunks = self._chunks(step)
                if chunks:
                    last = chunks[-1]
                    await self._write(send, b"".join(map(self._event, chunks)))
        except ApiError as problem:
            await self._write(send, b"data: " + to_bytes(problem.body) + b"\n\n", more=False)
            return
        end = b""
        if self._include_usage and last:
            frame = {key: value for key, value in last.items() if key != "timings"}
            end = b"data: " + to_bytes(self._telling.totals(frame, self._ticket.waited_s or 0.0)) + b"\n\n"
        await self._write(send, end + b"data: [DONE]\n\n", more=False)

    def _chunks(self, step: Step) -> list[dict[str, Any]]:
        answer = self._telling.answers[step.index]
        chunks = self._telling.chunks(step.index, *answer.add(step.delta))
        if answer.finish is not None:
            chunks.append(self._telling.end(step.index))
            if step.index == len(self._telling.answers) - 1 and not self._include_usage:
                chunks[-1]["timings"] = self._telling.timings(self._ticket.waited_s or 0.0)
        return chunks

    def _event(self, chunk: dict[str, Any]) -> bytes:
        if self._include_usage:
            chunk = chunk | {"usage": None}
        return b"data: " + to_bytes(chunk) + b"\n\n"


class PatientDocument(_Live):
    """One JSON document at the end."""

    def __init__(
        self,
        ticket: Ticket,
        telling: Telling,
        *,
        patience_s: float = PATIENCE_SECONDS,
        ping_s: float = PING_SECONDS,
        send_s: float = 60.0,
    ) -> None:
        """Begin.

        Args:
            ticket: where steps come from.
            telling: what is said of them.
            patience_s: before the first line break.
            ping_s: between two line breaks.
            send_s: after which a client that takes no bytes is left alone.
        """
        super().__init__(ticket, telling, ping_s=ping_s, send_s=send_s)
        self._patience_s = patience_s

    async def _tell(self, send: Send) -> None:
        begun = False
        loop = asyncio.get_running_loop()
        sign_at = loop.time() + self._patience_s
        while True:
            try:
                step, waiting = await self._next(max(0.0, sign_at - loop.time()))
            except ApiError as problem:
                if begun:
                    raise CutOffError from problem
                raise
            if self._gone:
                return
            if waiting:
                if not begun:
                    await send(_start(200, {"content-type": JSON_TYPE}))
                    begun = True
                await self._write(send, b"\n")
                sign_at = loop.time() + self._ping_s
            elif step is None:
                break
            else:
                self._telling.answers[step.index].add(step.delta)
        body = to_bytes(self._telling.whole(self._ticket.waited_s or 0.0))
        if not begun:
            await send(_start(200, {"content-type": JSON_TYPE, "content-length": str(len(body))}))
        await self._write(send, body, more=False)


def _start(status: int, headers: Mapping[str, str]) -> dict[str, Any]:
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}
