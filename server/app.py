"""The routes, as one ASGI application.

In: a service. Out: an application for uvicorn, or for tests. Every route reads its own body, within the
limits, and answers with documents of this package; the framework finds routes and runs the lifespan.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from .asking.body import Receive, read_body
from .gate.guard import ABOUT, About, App, Guard, shielded
from .hearing import Hearing
from .metrics import TYPE
from .problem import ApiError
from .replying.forms import Telling
from .replying.responses import Reply, Send, document, to_bytes
from .replying.transcripts import transcript_reply
from .service import Kind, Service


class _Endpoint:
    """A route that speaks ASGI itself: it must see the client go away while it answers."""

    def __init__(self, handler: App) -> None:
        self._handler = shielded(handler)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        await self._handler(scope, receive, send)


def make_app(service: Service, *, failed: Callable[[], None] = lambda: None) -> App:
    """The application of a service.

    Args:
        service: started and stopped with the application.
        failed: called, from another thread, if the engine cannot be loaded.
    """
    hearing = Hearing(service.settings, service.metrics, is_stopping=lambda: service.state == "stopping")
    routes = _Routes(service, hearing)
    paths = {
        "/v1/chat/completions": (_Endpoint(routes.chat), ["POST"]),
        "/v1/completions": (_Endpoint(routes.completion), ["POST"]),
        "/v1/audio/transcriptions": (_Endpoint(routes.transcription), ["POST"]),
        "/generate": (_Endpoint(routes.generate), ["POST"]),
        "/tokenize": (_Endpoint(routes.tokenize), ["POST"]),
        "/detokenize": (_Endpoint(routes.detokenize), ["POST"]),
        "/v1/models": (_Endpoint(routes.models), ["GET"]),
        "/health": (_Endpoint(routes.health), ["GET"]),
        "/metrics": (_Endpoint(routes.metrics), ["GET"]),
    }

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start(failed)
        try:
            yield
        finally:
            hearing.stop()
            service.stop()

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.redirect_slashes = False
    for path, (endpoint, methods) in paths.items():
        app.router.routes.append(Route(path, endpoint, methods=methods))
    one_model = Route("/v1/models/{name:path}", _Endpoint(routes.model), methods=["GET"])
    app.router.routes.append(one_model)
    app.add_exception_handler(HTTPException, _not_found)
    guarded: App = Guard(app, service, paths)
    if service.settings.origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=service.settings.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type", "x-request-id"),
            expose_headers=("x-request-id",),
        )
    return guarded


class _Routes:
    """One method per route."""

    def __init__(self, service: Service, hearing: Hearing) -> None:
        self._service = service
        self._hearing = hearing

    async def chat(self, scope: Any, receive: Receive, send: Send) -> None:
        await self._answer("chat", scope, receive, send)

    async def completion(self, scope: Any, receive: Receive, send: Send) -> None:
        await self._answer("completion", scope, receive, send)

    async def transcription(self, scope: Any, receive: Receive, send: Send) -> None:
        about: About = scope[ABOUT]
        with self._service.slot():
            body = await self._body(scope, receive)
            kind = about.headers.get(b"content-type", b"")
            asked, heard = await self._hearing.transcribe(body, kind, about.client, receive)
        about.counts = f" sound={heard.seconds:.1f}s"
        said, media = transcript_reply(heard, asked.form, asked.granularities)
        await Reply(200, said, {}, media)(scope, receive, send)

    async def generate(self, scope: Any, receive: Receive, send: Send) -> None:
        await self._answer("generate", scope, receive, send)

    async def tokenize(self, scope: Any, receive: Receive, send: Send) -> None:
        with self._service.slot():
            found = await self._service.tokenize(await self._body(scope, receive))
        await document(found)(scope, receive, send)

    async def detokenize(self, scope: Any, receive: Receive, send: Send) -> None:
        with self._service.slot():
            found = await self._service.detokenize(await self._body(scope, receive))
        await document(found)(scope, receive, send)

    async def models(self, scope: Any, receive: Receive, send: Send) -> None:
        await document(self._service.models())(scope, receive, send)

    async def model(self, scope: Any, receive: Receive, send: Send) -> None:
        await document(self._service.model(scope["path_params"]["name"]))(scope, receive, send)

    async def health(self, scope: Any, receive: Receive, send: Send) -> None:
        state = self._service.state
        status = "ok" if state == "ready" else state
        await document({"status": status}, 200 if state == "ready" else 503)(scope, receive, send)

    async def metrics(self, scope: Any, receive: Receive, send: Send) -> None:
        sounds = {"queued_sounds": ("Sounds that wait to be heard.", float(self._hearing.waiting))}
        text = self._service.metrics.text(self._service.gauges() | sounds)
        await Reply(200, text.encode(), {}, TYPE)(scope, receive, send)

    async def _answer(self, kind: Kind, scope: Any, receive: Receive, send: Send) -> None:
        about: About = scope[ABOUT]
        with self._service.slot():
            body = await self._body(scope, receive)
            if kind == "chat":
                body = await self._hearing.chat_body(body, about.client, receive)
            response, telling = await self._service.answer(kind, body, about.request_id, about.client)
            del body  # megabytes of picture, and the answer may take long
            try:
                await response(scope, receive, send)
            finally:
                about.counts = _counts(telling)

    async def _body(self, scope: Any, receive: Receive) -> bytes:
        about: About = scope[ABOUT]
        declared = about.headers.get(b"content-length")
        length = None if declared is None else declared.decode("latin-1")
        return await read_body(receive, self._service.settings.limits, length)


def _counts(telling: Telling) -> str:
    found = [answer.usage for answer in telling.answers if answer.usage is not None]
    if not found:
        return ""
    prompt, cached = found[0].prompt_tokens, found[0].cached_tokens
    return f" prompt={prompt} cached={cached} answer={sum(usage.completion_tokens for usage in found)}"


async def _not_found(request: Request, error: Exception) -> Response:
    """What the framework says of unknown paths and methods, in OpenAI's form."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    said = {
        404: "there is nothing at this path; see docs/server.md for what there is",
        405: f"this path takes {headers.get('Allow', 'another method')}",
    }
    problem = ApiError(status, said.get(status, "the request cannot be served"), code="not_found")
    return Response(to_bytes(problem.body), status, headers, media_type="application/json")
