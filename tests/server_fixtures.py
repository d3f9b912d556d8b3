"""A live server on loopback, and engines to put behind it.

`Live` runs the real application in uvicorn, in a thread, on a free port. `ScriptedEngine` answers from a
script, with steps that wait until a test lets them go, so that queues and cancels need no sleeping.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
from PIL import Image

from autoglm_edge.errors import ContextLengthError, PromptError
from autoglm_edge.runtime.answer import Delta, Timings, Usage
from autoglm_edge.runtime.prompt.build import Prompt
from autoglm_edge.runtime.prompt.messages import read_messages
from autoglm_edge.server.run import Server, bind, url_of
from autoglm_edge.server.service import Service
from autoglm_edge.server.settings import Settings
from autoglm_edge.server.work.answering import Answering, Wanted

NAMES = ("pocket", "autoglm-phone-9b")
CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


class ScriptedEngine:
    """The interface of `Answering`: text becomes one token per character.

    Attributes:
        script: pieces of the next answers; by default the user's last words come back.
        gate: answers wait for it before each piece; open unless a test closes it.
        begun: users' words of the answers that began, in order.
        ended: the same when they ended, with whether they were cancelled.
        error: raised at the first step if it is set.
    """

    concurrency = 1
    context = 1000
    vocab = 0x110000
    fingerprint = "fp_test"

    def __init__(self) -> None:
        self.script: Sequence[str] | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[str] = []
        self.ended: list[tuple[str, bool]] = []
        self.error: BaseException | None = None
        self.closed = False
        self.thinking: list[bool | None] = []

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, thinking: bool | None
    ) -> Prompt:
        self.thinking.append(thinking)
        return self._prompt(self.chat_ids(messages), max_tokens)

    def text_prompt(self, text: str, *, max_tokens: int) -> Prompt:
        return self._prompt(self.text_ids(text), max_tokens)

    def ids_prompt(self, ids: Sequence[int], *, max_tokens: int) -> Prompt:
        return self._prompt(list(ids), max_tokens)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        read = read_messages(messages)
        texts = [getattr(part, "text", "") for part in read[-1].parts]
        pictures = sum(len(message.images) for message in read)
        return [0] * (10 * pictures) + self.text_ids("".join(texts))

    def text_ids(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("the text holds a lone surrogate") from error
        return [ord(character) for character in text]

    def text_of(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def answer_wanted(self, wanted: Wanted, cancel: threading.Event) -> Generator[Delta, None, None]:
        said = self.text_of([token for token in wanted.prompt.ids if token])
        self.begun.append(said)
        try:
            if self.error is not None:
                raise self.error
            yield from self._pieces(said, wanted, cancel)
        finally:
            self.ended.append((said, cancel.is_set()))

    @contextmanager
    def answers(self) -> Iterator[ScriptedAnswers]:
        yield ScriptedAnswers(self)

    def close(self) -> None:
        self.closed = True

    def _pieces(self, said: str, wanted: Wanted, cancel: threading.Event) -> Iterator[Delta]:
        pieces = list(said if self.script is None else self.script)
        reason, count = "stop", 0
        for piece in pieces[: wanted.max_tokens]:
            while not self.gate.wait(0.01):
                if cancel.is_set():
                    break
            if cancel.is_set():
                reason = "cancelled"
                break
            count += 1
            yield Delta(piece, (1,))
        if len(pieces) > wanted.max_tokens and reason == "stop":
            reason = "length"
        usage = Usage(len(wanted.prompt.ids), 0, count)
        timings = Timings(0.0, 1.0, 2.0, 3.0, len(wanted.prompt.ids), max(0, count - 1))
        yield Delta("", (), reason, usage, timings)  # type: ignore[arg-type]

    def _prompt(self, ids: list[int], max_tokens: int) -> Prompt:
        if not ids:
            raise PromptError("prompt is empty; give at least one token")
        if len(ids) + max_tokens > self.context:
            raise ContextLengthError(len(ids), max_tokens, self.context)
        return Prompt(np.array(ids, np.int64), (), np.zeros((3, len(ids)), np.int64), len(ids), "")


class ScriptedAnswers:
    """The interface of `Answers`: a piece of each answer in each step."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.going: dict[int, Generator[Delta, None, None]] = {}
        self.numbers = itertools.count()

    @property
    def room(self) -> int:
        return self.engine.concurrency - len(self.going)

    @property
    def active(self) -> int:
        return len(self.going)

    def begin(self, wanted: Wanted, cancel: threading.Event) -> int:
        number = next(self.numbers)
        self.going[number] = self.engine.answer_wanted(wanted, cancel)
        return number

    def drop(self, number: int) -> None:
        if number in self.going:
            self.going.pop(number).close()

    def step(self) -> list[tuple[int, Delta | Exception]]:
        events: list[tuple[int, Delta | Exception]] = []
        for number, answer in [*self.going.items()]:
            try:
                event: Delta | Exception = next(answer)
            except Exception as error:
                event = error
            events.append((number, event))
            if isinstance(event, Exception) or event.finish_reason is not None:
                self.drop(number)
        return events


class Live:
    """A server that runs, and how to ask it.

    Attributes:
        service: what is served.
        url: where.
        http: a client of it.
    """

    def __init__(self, service: Service, url: str, server: Server) -> None:
        self.service = service
        self.url = url
        self.server = server
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def chat(self, text: str = "Hi", **fields: Any) -> httpx.Response:
        return self.post(CHAT, {"messages": [{"role": "user", "content": text}]} | fields)

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def raw(self, data: bytes) -> socket.socket:
        """A connection on which those bytes were sent."""
        connection = socket.create_connection(self.address, timeout=30)
        connection.sendall(data)
        return connection


@contextmanager
def running(load: Callable[[], Answering], *, wait: bool = True, **changes: Any) -> Iterator[Live]:
    """A live server until the end of the block.

    Args:
        load: gives the engine.
        wait: until it is loaded.
        changes: fields of `Settings`.
    """
    service = Service(replace(Settings(NAMES, grace_s=5.0), **changes), load)
    listener = bind("127.0.0.1", 0)
    url = url_of(listener)
    server = Server(service)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    live = Live(service, url, server)
    try:
        wait_until(lambda: server.started and not (wait and service.state == "loading"))
        yield live
    finally:
        server.should_exit = True
        live.http.close()
        thread.join(30)
        listener.close()
    assert not thread.is_alive()


def wait_until(done: Callable[[], object], seconds: float = 30.0) -> None:
    """Until something is so."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def events_of(response: httpx.Response) -> list[Any]:
    """The documents of a stream; "[DONE]" as itself."""
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def text_of(events: Sequence[Any], key: str = "content", index: int = 0) -> str:
    """What the chunks of one answer say together."""
    choices = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice["delta"].get(key) or "" for choice in choices if choice["index"] == index)


def png(image: Image.Image, **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def data_uri(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(data)}}
