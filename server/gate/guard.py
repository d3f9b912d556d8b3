"""The outermost layer: who may ask, a name for every request, one log line each, no error gets past.

In: ASGI. Out: ASGI. The log line has method, route, status, times and counts; never a text, a query or a key.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoglm_edge.server.asking.body import ClientGoneError, Receive, drain
from autoglm_edge.server.problem import ApiError, internal
from autoglm_edge.server.replying.responses import CutOffError, Send, problem_reply
from autoglm_edge.server.service import Service
from autoglm_edge.server.work.scheduler import LOG, trace_of

from .access import is_expected_host

App = Callable[[Any, Receive, Send], Awaitable[None]]

OPEN_ROUTES = frozenset({"/health"})
"""Answered without a key: whoever watches the server should not need one."""
FORM_ROUTES = frozenset({"/v1/audio/transcriptions"})
"""Take a form with a file in place of JSON."""
_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
HUNG_UP = 499
"""Status in the log of a request whose client went away before it got one."""
ABOUT = "autoglm"
"""Where `About` stands in a scope."""


@dataclass
class About:
    """What is known of a request beside its body.

    Attributes:
        request_id: the client's own, or a new one.
        client: key and address; who takes turns with whom.
        counts: of tokens, for the log.
        headers: of the request; of several with one name the last.
    """

    request_id: str
    client: str = "-"
    counts: str = ""
    headers: dict[bytes, bytes] = field(default_factory=dict)


class Guard:
    """Wraps the application."""

    def __init__(self, app: App, service: Service, routes: Collection[str]) -> None:
        """Begin.

        Args:
            app: what lies within.
            service: counters and settings.
            routes: known paths; others are one name in log and metrics.
        """
        self._app = app
        self._service = service
        self._routes = frozenset(routes)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        about = _about(scope)
        scope[ABOUT] = about
        status = 0

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_extra(about.request_id)]
            await send(message)

        try:
            await shielded(self._serve)(scope, receive, answer)
        finally:
            status = status or HUNG_UP
            seconds = time.perf_counter() - started
            route = self._route(scope["path"])
            self._service.metrics.request(route, status, seconds)
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            LOG.info(
                "%s %s %s %d %.3fs%s id=%s",
                about.client,
                method,
                route,
                status,
                seconds,
                about.counts,
                about.request_id,
            )

    async def _serve(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            self._admit(scope, scope[ABOUT])
        except ApiError:
            if scope["method"] == "POST":
                await drain(receive)
            raise
        await self._app(scope, receive, send)

    def _admit(self, scope: Any, about: About) -> None:
        """Host, key and content type.

        Raises:
            ApiError: one of them is wrong.
        """
        settings = self._service.settings
        host = about.headers.get(b"host")
        if not is_expected_host(None if host is None else host.decode("latin-1"), settings.hosts):
            raise ApiError(
                421,
                "the Host header names another server; ask by localhost or an address, or start the server "
                "with a key",
                code="wrong_host",
            )
        address = scope["client"][0] if scope.get("client") else "-"
        about.client = address
        if settings.keys and scope["path"] not in OPEN_ROUTES:
            key = settings.keys.find(about.headers.get(b"authorization"))
            if key is None:
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send Authorization: Bearer and the key",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            about.client = f"{address}#{key}"
        if scope["method"] == "POST" and scope["path"] in self._routes:
            kind = about.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if scope["path"] in FORM_ROUTES:
                _admit_form(kind, about.headers, settings.origins)
            # What a web page may send to any address without asking first is never this type.
            elif kind != b"application/json":
                raise ApiError(
                    415,
                    "the body must be JSON, with the header Content-Type: application/json",
                    code="wrong_content_type",
                )

    def _route(self, path: str) -> str:
        if path in self._routes:
            return path
        return "/v1/models/" if path.startswith("/v1/models/") else "other"


def _admit_form(kind: bytes, headers: Mapping[bytes, bytes], origins: Collection[str]) -> None:
    """A form, which web pages may send without asking: they say where they are from, and must be allowed.

    Raises:
        ApiError: no form, or of a page that may not ask.
    """
    if kind != b"multipart/form-data":
        raise ApiError(
            415,
            "the body must be a form with a file, with the header Content-Type: multipart/form-data",
            code="wrong_content_type",
        )
    origin = headers.get(b"origin")
    if origin is not None and "*" not in origins and origin.decode("latin-1") not in origins:
        raise ApiError(
            403,
            "web pages of this origin may not ask; start the server with --allow-origin and its address",
            code="wrong_origin",
        )


def shielded(app: App) -> App:
    """An application that no error leaves: what can still be said is said, the rest goes to the log.

    Args:
        app: gets scopes that a `Guard` has marked.
    """

    async def run(scope: Any, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        name = scope[ABOUT].request_id
        try:
            await app(scope, receive, watched)
            return
        except ClientGoneError:
            return
        except CutOffError:
            LOG.warning("%s: the connection was cut before the response was complete", name)
            return
        except ApiError as error:
            problem = error
        # The process goes on, whatever a request has set off.
        except Exception as error:
            LOG.error("%s failed:\n%s", name, trace_of(error))
            problem = internal(name)
        if not begun:
            await problem_reply(problem)(scope, receive, send)

    return run


_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH"})


def _about(scope: Any) -> About:
    headers = dict(scope["headers"])
    given = headers.get(b"x-request-id", b"")
    name = given.decode("ascii") if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
    return About(name, headers=headers)


def _extra(request_id: str) -> list[tuple[bytes, bytes]]:
    return [(b"x-request-id", request_id.encode("ascii")), (b"x-content-type-options", b"nosniff")]
