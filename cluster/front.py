"""What stands before the replicas: one address, the same gate as a server of one engine, a replica for each.

In: HTTP requests, a fleet. Out: the responses of replicas, passed on as they come. Knows nothing of what is
asked for: what is wrong with a request is said by the replica.

A client that goes away ends its connection to the replica, which ends the work. A request whose replica dies
before it said anything is asked once more of another one; after that, or in the middle, it is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from autoglm_edge.server.asking.body import ClientGoneError, Receive, read_body
from autoglm_edge.server.gate.guard import ABOUT, About
from autoglm_edge.server.metrics import TYPE
from autoglm_edge.server.problem import ApiError
from autoglm_edge.server.replying.responses import CutOffError, Reply, Send, document
from autoglm_edge.server.service import Service
from autoglm_edge.server.work.scheduler import queue_full, stopping

from .exchange import Exchange, Head, ReplicaLostError, exchange
from .exposition import joined
from .fleet import Fleet, Replica
from .replica import CLIENT_HEADER
from .router import Router, marks_of

ATTEMPTS = 2
METRICS_SECONDS = 5.0
_PASSED_ON = (b"content-type", b"accept")
_OWN = frozenset(
    {b"connection", b"date", b"server", b"transfer-encoding", b"x-request-id", b"x-content-type-options"}
)


class Front:
    """An ASGI application, to be put behind a `Guard`."""

    def __init__(self, service: Service, fleet: Fleet, router: Router, *, most: int, stop_s: float) -> None:
        """Begin.

        Args:
            service: settings and counters; it is never started.
            fleet: started and stopped with the application.
            router: chooses.
            most: requests at a time; more get status 429.
            stop_s: that replicas may take to end.
        """
        self._service = service
        self._fleet = fleet
        self._router = router
        self._most = most
        self._stop_s = stop_s
        self._admitted = 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """One request, or the life of the application."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["path"] == "/health":
            await self._health()(scope, receive, send)
        elif scope["path"] == "/metrics":
            await (await self._metrics())(scope, receive, send)
        else:
            with self._slot():
                await self._pass_on(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._fleet.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._fleet.stop(self._stop_s)
        await send({"type": "lifespan.shutdown.complete"})

    def _health(self) -> Reply:
        ready = len(self._fleet.ready)
        state = "stopping" if self._service.state == "stopping" else "ok" if ready else "loading"
        counts = {"ready": ready, "of": len(self._fleet.replicas)}
        return document({"status": state, "replicas": counts}, 200 if state == "ok" else 503)

    async def _metrics(self) -> Reply:
        gauges = {
            "replicas": ("Replicas that there should be.", float(len(self._fleet.replicas))),
            "replicas_ready": ("Replicas that answer.", float(len(self._fleet.ready))),
            "replica_starts": ("Starts of all replicas.", float(sum(r.starts for r in self._fleet.replicas))),
        }
        texts = {"front": self._service.metrics.text(gauges)}
        asked = await asyncio.gather(*(_text_of(replica) for replica in self._fleet.ready))
        texts |= {str(replica.index): text for replica, text in asked if text is not None}
        return Reply(200, joined(texts).encode(), {}, TYPE)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        """Bound what all requests together hold in memory.

        Raises:
            ApiError: there are as many as may be.
        """
        if self._service.state == "stopping":
            raise stopping()
        if self._admitted >= self._most:
            raise queue_full(self._most)
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def _pass_on(self, scope: Any, receive: Receive, send: Send) -> None:
        about: About = scope[ABOUT]
        declared = about.headers.get(b"content-length")
        limits = self._service.settings.limits
        body = await read_body(receive, limits, None if declared is None else declared.decode("latin-1"))
        marks = marks_of(about.client, body)
        tried: set[int] = set()
        while len(tried) < ATTEMPTS:
            loads = {
                replica.index: replica.load for replica in self._fleet.ready if replica.index not in tried
            }
            if not loads:
                break
            replica = self._fleet.replicas[self._router.choose(marks, loads)]
            tried.add(replica.index)
            replica.load += 1
            try:
                if await self._ask(replica, scope, body, receive, send):
                    return
            finally:
                replica.load -= 1
        if tried:
            raise ApiError(
                503,
                "the replica that was to answer is gone and is being started again; ask again",
                code="replica_lost",
                headers={"retry-after": "2"},
            )
        raise ApiError(503, "the model is being loaded", code="model_loading", headers={"retry-after": "2"})

    async def _ask(self, replica: Replica, scope: Any, body: bytes, receive: Receive, send: Send) -> bool:
        """Have a replica answer; False if it is gone, and nothing was said yet.

        Raises:
            CutOffError: it went in the middle, or the client takes no bytes.
            ClientGoneError: the client hung up.
        """
        about: About = scope[ABOUT]
        headers = [(name, about.headers[name]) for name in _PASSED_ON if name in about.headers]
        headers += [(b"x-request-id", about.request_id.encode("ascii"))]
        headers += [(CLIENT_HEADER, about.client.encode("latin-1", "replace"))]
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        gone = asyncio.create_task(_gone(receive))
        begun = False
        try:
            async with exchange(replica.socket, scope["method"], target, headers, body) as asked:
                head = await _unless(gone, asked.head())
                begun = True
                await self._send(send, _start(head))
                await self._stream(asked, gone, send)
            return True
        except ReplicaLostError as error:
            if begun:
                raise CutOffError from error
            return False
        finally:
            gone.cancel()

    async def _stream(self, asked: Exchange, gone: asyncio.Task[None], send: Send) -> None:
        async with aclosing(asked.pieces()) as pieces:
            while (piece := await _unless(gone, anext(pieces, None))) is not None:
                await self._send(send, {"type": "http.response.body", "body": piece, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._service.settings.limits.send_seconds):
                await send(message)
        except TimeoutError as error:
            raise CutOffError from error


async def _gone(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: asyncio.Task[None], work: Any) -> Any:
    """The result of something, unless the client goes away first.

    Raises:
        ClientGoneError: it does.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _start(head: Head) -> dict[str, Any]:
    headers = [(name, value) for name, value in head.headers if name.lower() not in _OWN]
    return {"type": "http.response.start", "status": head.status, "headers": headers}


async def _text_of(replica: Replica) -> tuple[Replica, str | None]:
    """The metrics of a replica; None if it is gone."""
    try:
        async with (
            asyncio.timeout(METRICS_SECONDS),
            exchange(replica.socket, "GET", b"/metrics", (), b"") as asked,
        ):
            head = await asked.head()
            text = b"".join([piece async for piece in asked.pieces()])
    except (ReplicaLostError, TimeoutError):
        return replica, None
    return replica, text.decode("utf-8", "replace") if head.status == 200 else None
