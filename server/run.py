"""Runs a server: a socket, uvicorn, signals.

In: a service and an address. Out: nothing until it is stopped. The socket is bound before anything is loaded,
so that an address in use is said at once, and /health says that the model is being loaded.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from autoglm_edge.errors import DeviceError

from .app import make_app
from .gate.protocol import BoundedProtocol
from .service import Service

CONNECTIONS = 512
BACKLOG = 128
KEEP_ALIVE_SECONDS = 75
HEAD_BYTES = 32768
_UNACKNOWLEDGED_MS = 120_000


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: name or address.
        port: 0 takes a free one.

    Raises:
        DeviceError: the address is in use, or not one of this machine.
    """
    listener: socket.socket | None = None
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        # The protocol is named: asyncio sends small pieces at once (TCP_NODELAY) only on sockets that say it.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise DeviceError(f"{host} port {port} cannot be served ({reason}); choose another --port") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # a client that takes no bytes and says nothing is given up
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, told what a signal means here.

    Attributes:
        signal: that ended it, or None.
    """

    def __init__(self, service: Service, *, told: Callable[[str], None] = lambda text: None) -> None:
        """Prepare.

        Args:
            service: what is served.
            told: gets a sentence when a signal comes.
        """
        grace = service.settings.grace_s
        config = uvicorn.Config(
            make_app(service, failed=self._failed),
            http=BoundedProtocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(grace)) + 3,
            h11_max_incomplete_event_size=HEAD_BYTES,
        )
        super().__init__(config)
        self.signal: int | None = None
        self._service = service
        self._told = told
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No more requests; the answer under way may end, but not for ever."""
        self._service.refuse_more()
        timer = asyncio.get_running_loop().call_later(self._service.settings.grace_s, self._service.interrupt)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal ends gracefully, a second one at once."""
        self.signal = sig
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        self._told(
            f"stopping: an answer under way may take {self._service.settings.grace_s:g} s more; "
            "Ctrl-C again ends at once"
        )

    def _failed(self) -> None:
        """The engine could not be loaded; from another thread."""
        self.should_exit = True


def serve(
    service: Service, listener: socket.socket, *, told: Callable[[str], None] = lambda text: None
) -> None:
    """Serve until a signal comes.

    Args:
        service: not started yet.
        listener: from `bind`.
        told: gets a sentence when a signal comes.

    Raises:
        KeyboardInterrupt: it was SIGINT.
        EdgeError: the engine could not be loaded.
    """
    server = Server(service, told=told)
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
    if service.error is not None:
        raise service.error
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt
