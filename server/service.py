"""The server without its sockets: loads the engine, admits requests, prepares them, has them answered.

In: parsed HTTP requests. Out: responses as ASGI applications. Knows nothing of keys, logs and signals.

A request that is admitted holds a slot until its response is complete. There are as many as may wait, and as
are answered at a time: so what all requests together hold in memory is bounded, too.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from autoglm_edge.errors import EdgeError

from .asking.asked import (
    read_chat,
    read_completion,
    read_detokenize,
    read_generate,
    read_tokenize,
)
from .asking.body import parse_json
from .asking.options import Options
from .metrics import Metrics
from .prepared import Prepared, prepare_chat, prepare_text
from .problem import ApiError, refuse
from .replying.forms import ChatForm, Form, Frame, GenerateForm, Telling, TextForm
from .replying.responses import EventStream, PatientDocument
from .settings import Settings
from .work.answering import Answering
from .work.scheduler import LOG, Scheduler, queue_full, stopping, trace_of
from .work.side_threads import SideThreads

PREPARING_THREADS = 2
"""Pictures that are unpacked at the same time; the engine wants the cores, too."""
Kind = Literal["chat", "completion", "generate"]
State = Literal["loading", "ready", "failed", "stopping"]


class Service:
    """One engine, and all that is asked of it.

    Attributes:
        settings: see there.
        metrics: counters.
        error: why the engine could not be loaded; None if it was.
    """

    def __init__(self, settings: Settings, load: Callable[[], Answering]) -> None:
        """Prepare; nothing is loaded before `start`.

        Args:
            settings: of the server.
            load: opens the engine; called once, in a thread.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.error: BaseException | None = None
        self._load = load
        self._engine: Answering | None = None
        self._scheduler: Scheduler | None = None
        self._threads = SideThreads(PREPARING_THREADS, "prepare")
        self._admitted = 0
        self._stopping = False
        self._started = int(time.time())

    @property
    def state(self) -> State:
        """What the server can do just now."""
        if self._stopping:
            return "stopping"
        if self.error is not None:
            return "failed"
        return "loading" if self._scheduler is None else "ready"

    def start(self, failed: Callable[[], None] = lambda: None) -> None:
        """Load the engine, in a thread.

        Args:
            failed: called from that thread if it cannot be loaded; `error` says why.
        """
        threading.Thread(target=self._open, args=(failed,), name="load", daemon=True).start()

    def refuse_more(self) -> None:
        """The server is going down: requests that wait are sent away, those under way go on."""
        self._stopping = True
        if self._scheduler is not None:
            self._scheduler.refuse_more()

    def interrupt(self) -> None:
        """Those under way have had their time."""
        if self._scheduler is not None:
            self._scheduler.interrupt()

    def stop(self, timeout: float = 10.0) -> None:
        """End everything and free the engine; waits for the run of a graph that is under way."""
        self.refuse_more()
        self._threads.close()
        ended = self._scheduler is None or self._scheduler.stop(timeout)
        if self._engine is not None and ended:
            self._engine.close()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Admit a request.

        Raises:
            ApiError: there are as many as may be.
        """
        engine, _ = self._ready()
        most = self.settings.limits.queue + engine.concurrency
        if self._admitted >= most:
            raise queue_full(most)
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def answer(
        self, kind: Kind, body: bytes, request_id: str, client: str
    ) -> tuple[EventStream | PatientDocument, Telling]:
        """The response to a request for answers; sending it does the work.

        Args:
            kind: which endpoint.
            body: of the request.
            request_id: for the log.
            client: who asks; the request may say more exactly for whom.

        Raises:
            ApiError: something is wrong with the request.
        """
        engine, scheduler = self._ready()
        started = time.perf_counter()
        options, form, prepared, split = await self._threads.run(
            lambda: self._prepare(kind, body, engine, started)
        )
        telling = Telling(
            form,
            answers=len(prepared.wanted),
            per_prompt=prepared.per_prompt,
            split=split,
            prepare_s=prepared.prepare_s,
        )
        ticket = scheduler.submit(request_id, prepared.wanted, f"{client} {options.user}")
        send_s, ping_s = self.settings.limits.send_seconds, self.settings.ping_s
        if options.stream:
            stream = EventStream(
                ticket, telling, include_usage=options.include_usage, ping_s=ping_s, send_s=send_s
            )
            return stream, telling
        patience_s = self.settings.patience_s
        return PatientDocument(ticket, telling, patience_s=patience_s, ping_s=ping_s, send_s=send_s), telling

    async def tokenize(self, body: bytes) -> dict[str, Any]:
        """The document of /tokenize.

        Raises:
            ApiError: something is wrong with the request.
        """
        engine, _ = self._ready()
        return await self._threads.run(lambda: self._tokenize(body, engine))

    async def detokenize(self, body: bytes) -> dict[str, Any]:
        """The document of /detokenize.

        Raises:
            ApiError: something is wrong with the request.
        """
        engine, _ = self._ready()
        return await self._threads.run(lambda: self._detokenize(body, engine))

    def models(self) -> dict[str, Any]:
        """The document of /v1/models.

        Raises:
            ApiError: the engine is not loaded.
        """
        engine, _ = self._ready()
        return {"object": "list", "data": [self._model(name, engine) for name in self.settings.names]}

    def model(self, name: str) -> dict[str, Any]:
        """The document of one model.

        Raises:
            ApiError: there is none of that name, or the engine is not loaded.
        """
        engine, _ = self._ready()
        return self._model(self._name(name), engine)

    def gauges(self) -> dict[str, tuple[str, float]]:
        """What is going on, for the metrics."""
        scheduler = self._scheduler
        return {
            "ready": ("1 when requests are answered, 0 while loading or stopping.", self.state == "ready"),
            "admitted_requests": ("Requests that are read, wait or are answered.", self._admitted),
            "queued_requests": ("Requests that wait.", scheduler.waiting if scheduler else 0),
            "running_requests": ("Requests that are answered.", scheduler.running if scheduler else 0),
        }

    def _open(self, failed: Callable[[], None]) -> None:
        try:
            engine = self._load()
            self._engine = engine
            if self._stopping:
                engine.close()
                return
            self._scheduler = Scheduler(engine, self.metrics)
        # Whatever it is, the server must end with it and not wait for ever for an engine.
        except BaseException as error:
            if not isinstance(error, EdgeError):
                LOG.error("loading failed:\n%s", trace_of(error))
            self.error = error
            failed()

    def _ready(self) -> tuple[Answering, Scheduler]:
        if self._stopping:
            raise stopping()
        if self._engine is None or self._scheduler is None:
            raise ApiError(
                503, "the model is being loaded", code="model_loading", headers={"retry-after": "2"}
            )
        return self._engine, self._scheduler

    def _prepare(
        self, kind: Kind, body: bytes, engine: Answering, started: float
    ) -> tuple[Options, Form, Prepared, bool]:
        limits, value = self.settings.limits, parse_json(body, self.settings.limits)
        if kind == "completion":
            text = read_completion(value, limits)
            frame = self._frame("cmpl", text.options, engine)
            return text.options, TextForm(frame), prepare_text(text, engine, started), False
        if kind == "chat":
            chat = read_chat(value, limits, self.settings.fetch)
            frame = self._frame("chatcmpl", chat.options, engine)
            return chat.options, ChatForm(frame), prepare_chat(chat, engine, started), chat.split
        plain = read_generate(value, limits)
        frame = self._frame("gen", plain.options, engine)
        prepared = prepare_chat(plain, engine, started)
        images = prepared.wanted[0].prompt.images
        form = GenerateForm(frame, images[-1].original_size if images else None)
        return plain.options, form, prepared, False

    def _tokenize(self, body: bytes, engine: Answering) -> dict[str, Any]:
        limits = self.settings.limits
        asked = read_tokenize(parse_json(body, limits), limits, self.settings.fetch)
        self._name(asked.model)
        ids = engine.text_ids(asked.text) if asked.text is not None else engine.chat_ids(asked.messages or [])
        pieces = [engine.text_of([token]) for token in ids] if asked.pieces else None
        return {"count": len(ids), "max_model_len": engine.context, "tokens": ids, "token_strs": pieces}

    def _detokenize(self, body: bytes, engine: Answering) -> dict[str, Any]:
        model, ids = read_detokenize(parse_json(body, self.settings.limits), self.settings.limits)
        self._name(model)
        if ids and max(ids) >= engine.vocab:
            raise refuse(f"tokens holds {max(ids)}, the model knows 0 to {engine.vocab - 1}", "tokens")
        return {"prompt": engine.text_of(ids)}

    def _frame(self, kind: str, options: Options, engine: Answering) -> Frame:
        name = self._name(options.model)
        return Frame(f"{kind}-{uuid.uuid4().hex}", int(time.time()), name, engine.fingerprint)

    def _name(self, asked: str | None) -> str:
        """The name to answer under.

        Raises:
            ApiError: another model is asked for.
        """
        names = self.settings.names
        if asked is None:
            return names[0]
        if asked not in names:
            raise ApiError(
                404,
                f"the model {asked[:64]!r} is not served here, only {', '.join(names)}; "
                "another name can be given with --served-model-name",
                code="model_not_found",
                param="model",
            )
        return asked

    def _model(self, name: str, engine: Answering) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "autoglm-edge",
            "root": self.settings.names[0],
            "max_model_len": engine.context,
        }
