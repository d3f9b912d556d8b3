"""Sounds of requests, heard one after the other in a thread of their own, beside the engine's.

    event loop: hear ─→ FairQueue ─→ thread "hearing": listener ─→ event loop: transcript

In: forms and chat requests with sounds. Out: transcripts; chat requests whose sounds are texts. Knows nothing
of engines: the system shares the cores between an answer and a transcript, so neither waits for the other's
end. Clients take turns, and whoever goes away is not listened to any longer.
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image

from autoglm_edge.errors import DeviceError, EdgeError
from autoglm_edge.speech.sound import Sound
from autoglm_edge.speech.transcript import HearingOptions, Listener, Transcript, plain

from .asking.asked import read_chat
from .asking.audio import TranscriptionAsked, find_spoken, read_spoken, read_transcription
from .asking.body import ClientGoneError, Receive, parse_json
from .asking.content import Fetch
from .asking.multipart import read_form
from .metrics import Metrics
from .problem import ApiError, internal, problem_of
from .settings import Settings
from .work.fair_queue import FairQueue
from .work.scheduler import LOG, stopping, trace_of
from .work.side_threads import SideThreads

DECODING_THREADS = 2
OPENAI_NAME = "whisper-1"
"""What OpenAI's clients ask for."""
_MARK = b"input_audio"
_LOOK_SECONDS = 0.25
"""Between two looks at whether the server is stopping."""
Result = TypeVar("Result")


@dataclass(eq=False)
class _Job:
    """A sound that waits or is listened to."""

    sound: Sound
    options: HearingOptions
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Transcript]
    cancel: threading.Event = field(default_factory=threading.Event)

    def post(self, result: Transcript | ApiError | None) -> None:
        """Hand the end to the event loop, from any thread; None if nobody waits for it."""

        def settle() -> None:
            if self.done.done():
                return
            if isinstance(result, Transcript):
                self.done.set_result(result)
            elif result is None:
                self.done.cancel()
            else:
                self.done.set_exception(result)

        try:
            self.loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the loop is closed: nobody listens
            self.cancel.set()


class Hearing:
    """Whoever hears, and what waits to be heard. Begins its thread with the first sound."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare.

        Args:
            settings: of the server: who hears, and within which limits.
            metrics: are told.
            is_stopping: whether the server takes no more work.
        """
        self._listener = settings.listener
        self._limits = settings.limits
        self._grace_s = settings.grace_s
        self._looked_at: Fetch | None = None if settings.fetch is None else _no_fetch
        self._metrics = metrics
        self._is_stopping = is_stopping
        self._threads = SideThreads(DECODING_THREADS, "decode")
        self._queue: FairQueue[_Job] = FairQueue()
        self._change = threading.Condition()
        self._running: _Job | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the speech model; none if there is none."""
        return () if self._listener is None else tuple(dict.fromkeys((self._listener.name, OPENAI_NAME)))

    @property
    def waiting(self) -> int:
        """Sounds in the queue."""
        with self._change:
            return len(self._queue)

    async def transcribe(
        self, body: bytes, content_type: bytes, client: str, receive: Receive
    ) -> tuple[TranscriptionAsked, Transcript]:
        """A request of /v1/audio/transcriptions, and what was heard.

        Args:
            body: of the request.
            content_type: its header.
            client: with whom it takes turns.
            receive: of ASGI; tells when the client goes away.

        Raises:
            ApiError: something is wrong with the request, or with the model.
            ClientGoneError: the client went away.
        """
        self._ready()

        def read() -> TranscriptionAsked:
            return read_transcription(read_form(body, content_type), self._limits)

        asked = await self._threads.run(read)
        self._check_name(asked.model)
        heard = await unless_gone(receive, self.hear(asked.sound, asked.options, client))
        return asked, heard

    async def chat_body(self, body: bytes, client: str, receive: Receive) -> bytes:
        """The body of a chat request with texts in the place of its sounds; others stay as they are.

        All else in it is looked at before anything is heard, as far as that can be without the texts.

        Args:
            body: of the request.
            client: with whom it takes turns.
            receive: of ASGI; tells when the client goes away.

        Raises:
            ApiError: something is wrong with the request, or with the model.
            ClientGoneError: the client went away.
        """
        if _MARK not in body or self._listener is None:
            return body  # whoever reads the messages refuses sounds by name
        value = await self._threads.run(lambda: parse_json(body, self._limits))
        found = find_spoken(value)
        if not found:
            return body
        spoken = await self._threads.run(lambda: read_spoken(found, self._limits))
        for item in spoken:
            _become_text(item.part, "")
        await self._threads.run(lambda: read_chat(value, self._limits, self._looked_at))
        for item in spoken:
            heard = await unless_gone(receive, self.hear(item.sound, HearingOptions(), client))
            _become_text(item.part, plain(heard.text))
        return await self._threads.run(lambda: json.dumps(value).encode())

    async def hear(self, sound: Sound, options: HearingOptions, client: str) -> Transcript:
        """What is said in a sound. If the task is cancelled, so is the work.

        Args:
            sound: to listen to.
            options: how.
            client: with whom it takes turns.

        Raises:
            ApiError: too many wait, the model cannot hear it, or the server is stopping.
        """
        self._ready()
        loop = asyncio.get_running_loop()
        job = _Job(sound, options, loop, loop.create_future())
        with self._change:
            if len(self._queue) >= self._limits.audio_queue:
                raise ApiError(
                    429,
                    f"{self._limits.audio_queue} sounds are waiting to be heard, more are not taken; try "
                    "again later",
                    code="queue_full",
                    headers={"retry-after": "2"},
                )
            self._queue.push(client, job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hearing", daemon=True)
                self._thread.start()
            self._change.notify()
        try:
            await self._wait(job)
            return job.done.result()
        finally:
            job.cancel.set()
            with self._change:
                self._queue.remove(job)

    async def _wait(self, job: _Job) -> None:
        """Until it is done; a server that stops gives it some seconds more if it was begun.

        Raises:
            ApiError: the server is stopping.
        """
        loop = asyncio.get_running_loop()
        until: float | None = None
        while not job.done.done():
            if self._is_stopping():
                until = loop.time() + self._grace_s if until is None else until
                if job is not self._running or loop.time() >= until:
                    raise stopping()
            await asyncio.wait((job.done,), timeout=_LOOK_SECONDS)

    def stop(self, timeout: float = 10.0) -> bool:
        """End everything; True once nothing is listened to any more."""
        with self._change:
            self._closed = True
            jobs = self._queue.clear()
            running = self._running
            self._change.notify()
        for job in jobs if running is None else [*jobs, running]:
            job.cancel.set()
            job.post(stopping())
        self._threads.close()
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _ready(self) -> None:
        if self._closed or self._is_stopping():
            raise stopping()
        if self._listener is None:
            raise ApiError(
                404,
                "this server has no speech model; start it with --speech-model and a name or a file",
                code="model_not_found",
                param="model",
            )

    def _check_name(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"the speech model {name[:64]!r} is not served here, only {', '.join(self.names)}",
                code="model_not_found",
                param="model",
            )

    def _work(self) -> None:
        assert self._listener is not None, "nothing is queued without a listener"
        while True:
            with self._change:
                self._running = None
                while not len(self._queue) and not self._closed:
                    self._change.wait()
                job = self._queue.pop()
                if job is None:
                    return
                self._running = job
            job.post(self._listen(self._listener, job))

    def _listen(self, listener: Listener, job: _Job) -> Transcript | ApiError | None:
        if self._is_stopping():
            return stopping()
        started = time.perf_counter()
        try:
            heard = listener.transcribe(job.sound, job.options, job.cancel)
        except DeviceError as error:
            LOG.error("hearing failed: %s", error)
            return ApiError(503, "the device of the speech model is not available", code="device_unavailable")
        except EdgeError as error:
            problem = problem_of(error, params=("language", "prompt"))
            if problem.status >= 500:
                LOG.error(
                    "hearing failed: %s", error
                )  # about the model's file; nothing of a request is in it
            return problem
        # One sound, whatever it sets off in a model, must not end the thread that hears all.
        except Exception as error:
            LOG.error("hearing failed:\n%s", trace_of(error))
            return internal()
        if heard is not None:
            self._metrics.heard(job.sound.seconds, time.perf_counter() - started)
        return heard


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of some work, which is cancelled if the client goes away first.

    Args:
        receive: of ASGI, whose body was read.
        work: that can be cancelled.

    Raises:
        ClientGoneError: the client went away.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _no_fetch(url: str) -> bytes:
    """A picture of one pixel, in place of the one behind a URL while a request is only looked at."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


def _become_text(part: dict[str, Any], text: str) -> None:
    part.clear()
    part.update(type="text", text=text)
