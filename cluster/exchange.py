"""One HTTP request to a replica, over its Unix socket, and the response piece by piece.

In: a request with its whole body. Out: the head of a response, then its bytes as they come. Knows nothing of
which replica, and of who asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import h11

Headers = Sequence[tuple[bytes, bytes]]
CONNECT_SECONDS = 5.0
_PIECE = 65536
_HEAD_BYTES = 65536


class ReplicaLostError(Exception):
    """The replica is gone, or speaks no HTTP."""


@dataclass(frozen=True)
class Head:
    """How a response begins.

    Attributes:
        status: of HTTP.
        headers: with names in lower case.
    """

    status: int
    headers: Headers


class Exchange:
    """A request that was sent."""

    def __init__(self, reader: asyncio.StreamReader, connection: h11.Connection) -> None:
        self._reader = reader
        self._connection = connection

    async def head(self) -> Head:
        """The beginning of the response.

        Raises:
            ReplicaLostError: there is none.
        """
        event = await self._next()
        if not isinstance(event, h11.Response):
            raise ReplicaLostError
        return Head(event.status_code, [(bytes(name), bytes(value)) for name, value in event.headers])

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes.

        Raises:
            ReplicaLostError: it ends in the middle.
        """
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise ReplicaLostError

    async def _next(self) -> h11.Event | type[h11.PAUSED]:
        try:
            while (event := self._connection.next_event()) is h11.NEED_DATA:
                self._connection.receive_data(await self._reader.read(_PIECE))
        except (OSError, h11.RemoteProtocolError) as error:
            raise ReplicaLostError from error
        assert event is not h11.NEED_DATA
        return event  # type: ignore[return-value]


@asynccontextmanager
async def exchange(
    path: Path, method: str, target: bytes, headers: Headers, body: bytes
) -> AsyncIterator[Exchange]:
    """Send a request; leaving the block ends the connection, which ends the work for it.

    Args:
        path: of the socket.
        method: GET or POST.
        target: path and query.
        headers: beside those that the connection needs.
        body: all of it.

    Raises:
        ReplicaLostError: nobody listens.
    """
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(str(path))
    except (OSError, TimeoutError) as error:
        raise ReplicaLostError from error
    try:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)
        own = [
            (b"host", b"localhost"),
            (b"connection", b"close"),
            (b"content-length", str(len(body)).encode()),
        ]
        request = h11.Request(method=method, target=target, headers=[*own, *headers])
        try:
            for event in (request, h11.Data(data=body), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            await writer.drain()
        except OSError as error:
            raise ReplicaLostError from error
        yield Exchange(reader, connection)
    finally:
        writer.transport.abort()
