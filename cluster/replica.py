"""One replica: the server of one engine behind a Unix socket, as a child of the process that is asked.

In: a service and the path of a socket. Out: nothing until it is stopped: by a signal, or because its parent
is gone. Knows nothing of other replicas.

Only the user who started it reaches the socket, so keys and hosts are the parent's matter. Who asks is told
by the parent, in a header: it decides who takes turns with whom.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

from autoglm_edge.errors import DeviceError
from autoglm_edge.server.asking.body import Receive
from autoglm_edge.server.gate.guard import App
from autoglm_edge.server.replying.responses import Send
from autoglm_edge.server.run import BACKLOG, Server
from autoglm_edge.server.service import Service

CLIENT_HEADER = b"x-autoglm-client"
"""Key and address of who asks."""


def serve_replica(service: Service, path: Path) -> None:
    """Serve until the parent says otherwise, or is gone.

    Args:
        service: not started yet; it is asked by the parent alone.
        path: of the socket; nothing may be there.

    Raises:
        DeviceError: no socket can be made there.
        EdgeError: the engine could not be loaded.
    """
    server = Server(service)
    server.config.app = _told_who_asks(server.config.app)
    listener = _bind(path)
    threading.Thread(target=_stop_with_parent, args=(server,), daemon=True).start()
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        path.unlink(missing_ok=True)
    if service.error is not None:
        raise service.error


def _stop_with_parent(server: Server) -> None:
    """The parent holds the other end of standard input, and writes nothing."""
    while os.read(0, 1):  # not sys.stdin, whose lock the end of the interpreter wants
        pass
    server.should_exit = True


def _told_who_asks(app: Any) -> App:
    """An application that takes the client from a header in place of the connection."""

    async def run(scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            scope = scope | {"client": (headers.get(CLIENT_HEADER, b"-").decode("latin-1"), 0)}
        await app(scope, receive, send)

    return run


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise DeviceError(f"no socket can be made at {path} ({error.strerror or error})") from error
    return listener
