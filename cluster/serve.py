"""Several replicas of one bundle behind one address, on one machine: a GPU each, or cores of their own.

In: settings, the command that starts one replica, a listening socket. Out: nothing until it is stopped. Knows
nothing of requests and engines.

    client ─→ front: keys, limits, choice ─ Unix socket ─→ replica: queue, engine

Ray Serve could stand in the place of this module, and was not taken: its proxy takes whole bodies of any size
into an unbounded queue before a replica can refuse them, has no limit for slow heads and connections, and
counts CPUs without keeping replicas on cores of their own. Here the gate is the one of a single server, and
nothing more needs to be installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.middleware.cors import CORSMiddleware

from autoglm_edge.errors import DeviceError, RequestError
from autoglm_edge.server.gate.guard import App, Guard
from autoglm_edge.server.run import Server
from autoglm_edge.server.service import Service
from autoglm_edge.server.settings import Settings
from autoglm_edge.server.work.answering import Answering

from .cores import split_cpus
from .fleet import Fleet, Place
from .front import Front
from .router import Router

ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/audio/transcriptions",
    "/generate",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/health",
    "/metrics",
)
_WITHOUT_KEY = {"AUTOGLM_API_KEY": ""}
"""The front alone asks for keys."""


def places_of(count: int, *, cuda: bool) -> list[Place]:
    """What each replica is started with: a GPU, or CPUs.

    Args:
        count: of replicas.
        cuda: whether they compute on GPUs.

    Raises:
        RequestError: there are fewer CPUs, or GPUs that are named, than replicas.
    """
    if not cuda:
        return [
            Place(("--replica-cpus", ",".join(map(str, cpus))) if cpus else (), _WITHOUT_KEY)
            for cpus in split_cpus(count)
        ]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(index) for index in range(count)] if named is None else [d for d in named.split(",") if d]
    if len(devices) < count:
        raise RequestError(f"{count} replicas need a GPU each, CUDA_VISIBLE_DEVICES names {len(devices)}")
    return [Place(environment={**_WITHOUT_KEY, "CUDA_VISIBLE_DEVICES": device}) for device in devices[:count]]


class FrontServer(Server):
    """A server that passes requests on; signals mean what they mean to a single one.

    Attributes:
        fleet: its replicas.
    """

    def __init__(
        self,
        settings: Settings,
        command: Sequence[str],
        places: Sequence[Place],
        folder: Path,
        *,
        together: int,
        told: Callable[[str], None],
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            settings: keys, hosts and limits.
            command: starts a replica.
            places: one for each replica.
            folder: for sockets.
            together: answers that a replica gives at a time.
            told: gets sentences about what happens.
        """
        service = Service(settings, _never)
        super().__init__(service, told=told)
        router = Router(together)
        self.fleet = Fleet(command, places, folder, restarted=router.forget, failed=self._failed, told=told)
        most = len(places) * (settings.limits.queue + together)
        front = Front(service, self.fleet, router, most=most, stop_s=settings.grace_s + 5.0)
        guarded: App = Guard(front, service, ROUTES)
        if settings.origins:
            guarded = CORSMiddleware(
                guarded,
                allow_origins=settings.origins,
                allow_methods=("GET", "POST"),
                allow_headers=("authorization", "content-type", "x-request-id"),
                expose_headers=("x-request-id",),
            )
        self.config.app = guarded

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No more requests; replicas end the answers under way."""
        self.fleet.refuse_more()
        await super().shutdown(sockets)


def serve_replicas(
    settings: Settings,
    command: Sequence[str],
    places: Sequence[Place],
    listener: socket.socket,
    *,
    together: int = 1,
    told: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve until a signal comes.

    Args:
        settings: of the server.
        command: starts a replica; see `Fleet`.
        places: from `places_of`.
        listener: from `bind`.
        together: answers that a replica gives at a time.
        told: gets sentences about what happens.

    Raises:
        KeyboardInterrupt: it was SIGINT.
        DeviceError: the first replica could not be started.
    """
    folder = Path(tempfile.mkdtemp(prefix="autoglm-"))  # mode 0700: its sockets are this user's alone
    server = FrontServer(settings, command, places, folder, together=together, told=told)
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)
    if server.fleet.error is not None:
        raise server.fleet.error
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt


def _never() -> Answering:
    raise DeviceError("the front of replicas has no engine of its own")
