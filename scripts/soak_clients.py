"""Clients of the soak: each does at random what a client may do and what none should; a ledger keeps count.

In: a running server, a seed, an end. Out: counts and faults. They stream answers, take them whole, hold them
to JSON, go away in the middle of a stream, of a request or before the answer, ask for what cannot be, and
send what is no request. This module knows nothing of memory and of verdicts.
"""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from server_process import Running, stream

from autoglm_edge.embedded import sample_screenshot

CHAT = "/v1/chat/completions"
SILENCE_SECONDS = 60.0
"""A client that hears nothing for so long is a hang; comments and line breaks come more often."""
NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
POINT = {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}
ACTION = {
    "type": "object",
    "properties": {"action": {"enum": ["Tap", "Swipe"]}, "element": POINT},
    "required": ["action", "element"],
    "additionalProperties": False,
}
BAD: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "<|user|>"}]}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 999999}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "n": 99}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "surprise": 1}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "response_format": {"type": "xml"}}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}',
    json.dumps({"messages": [{"role": "user", "content": "Hi"}], "response_format": {
        "type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "Hi"}], "response_format": {
        "type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}).encode(),
    b'{"a":' * 500,
)  # fmt: skip


class Ledger:
    """What happened, from all threads."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def note(self, what: str) -> None:
        """Something went as it should."""
        with self._lock:
            self.done[what] += 1

    def fault(self, what: str) -> None:
        """Something did not; the first hundred are kept."""
        with self._lock:
            self.done["fault"] += 1
            if len(self.faults) < 100:
                self.faults.append(what)

    def status(self, kind: str, code: int, said: str = "") -> bool:
        """Count a status; True if it is 200."""
        if code >= 500:
            self.fault(f"{kind}: status {code} {said[:200]}")
        else:
            self.note(f"{kind} {code}")
        return code == 200


class Client:
    """One client, and all that it may do."""

    def __init__(self, server: Running, ledger: Ledger, seed: int) -> None:
        self._random = random.Random(seed)
        self._server = server
        self._ledger = ledger
        self._http = httpx.Client(base_url=server.url, trust_env=False, timeout=SILENCE_SECONDS)
        self._picture = sample_screenshot()
        self._acts: tuple[tuple[int, str, Callable[[], None]], ...] = (
            (6, "stream", self._stream),
            (3, "whole", self._whole),
            (5, "json", self._json),
            (4, "cancel", self._cancel),
            (2, "disconnect", self._disconnect),
            (1, "half", self._half),
            (5, "bad", self._bad),
            (1, "look", self._look),
        )

    def run(self, end: float) -> None:
        """Act until that time of `time.monotonic`."""
        names = [name for weight, name, _ in self._acts for _ in range(weight)]
        acts = {name: act for _, name, act in self._acts}
        while time.monotonic() < end:
            name = self._random.choice(names)
            try:
                acts[name]()
            except httpx.TimeoutException:
                self._ledger.fault(f"{name}: nothing came for {SILENCE_SECONDS:g} s")
            except (httpx.TransportError, OSError) as error:
                self._ledger.fault(f"{name}: {type(error).__name__} {error}")
                if self._server.process.poll() is not None:
                    return
        self._http.close()

    def _body(self, **fields: Any) -> dict[str, Any]:
        r = self._random
        text = "".join(r.choice("打开设置返回abc defg") for _ in range(r.randrange(1, 200)))
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if r.random() < 0.2:
            parts.insert(0, _picture_part(self._picture, r))
        system = {"role": "system", "content": f"You operate phone {r.randrange(40)}. " + "Act. " * 60}
        messages = [system] if r.random() < 0.5 else []
        body: dict[str, Any] = {"messages": [*messages, {"role": "user", "content": parts}]}
        body["max_tokens"] = r.randrange(1, 48)
        if r.random() < 0.5:
            body |= {"temperature": 0.9, "top_p": 0.9, "seed": r.randrange(10**6), "frequency_penalty": 0.2}
        return body | fields

    def _stream(self) -> None:
        self._finish("stream", stream(self._http, self._body()))

    def _cancel(self) -> None:
        body = self._body(max_tokens=400, logit_bias={})
        found = stream(self._http, body, most=self._random.randrange(1, 8))
        self._ledger.status("cancel", found.status, found.error)

    def _finish(self, kind: str, found: Any) -> None:
        if self._ledger.status(kind, found.status, found.error) and found.finish_reason is None:
            self._ledger.fault(f"{kind}: the stream ended without a reason: {found.error}")

    def _whole(self) -> None:
        response = self._http.post(CHAT, json=self._body(n=self._random.choice([1, 1, 2])))
        self._ledger.status("whole", response.status_code, response.text)

    def _json(self) -> None:
        r = self._random
        held: dict[str, Any] = r.choice(
            [
                {"type": "json_object"},
                {"type": "json_schema", "json_schema": {"name": "action", "schema": ACTION}},
                {
                    "type": "json_schema",
                    "json_schema": {"name": "one", "schema": {"const": r.randrange(999)}},
                },
            ]
        )
        body = self._body(response_format=held, max_tokens=r.randrange(8, 120))
        if r.random() < 0.5:
            found = stream(self._http, body)
            self._finish("json", found)
            text, reason = found.text, found.finish_reason
        else:
            response = self._http.post(CHAT, json=body)
            if not self._ledger.status("json", response.status_code, response.text):
                return
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        if reason == "stop" and (said := json_fault(text, held)):
            self._ledger.fault(f"json: {said}: {text[:200]!r}")

    def _disconnect(self) -> None:
        """Ask, and be gone before the answer begins."""
        body = json.dumps(self._body(stream=self._random.random() < 0.5, max_tokens=300)).encode()
        with self._connection() as connection:
            connection.sendall(_head(len(body)) + body)
            time.sleep(self._random.random() * 0.2)
        self._ledger.note("disconnect")

    def _half(self) -> None:
        """Half a request."""
        body = json.dumps(self._body()).encode()
        with self._connection() as connection:
            connection.sendall((_head(len(body)) + body)[: self._random.randrange(10, len(body))])
        self._ledger.note("half")

    def _bad(self) -> None:
        body = self._random.choice(BAD)
        headers = {"content-type": "application/json"}
        path = self._random.choice([CHAT, "/v1/completions", "/generate", "/tokenize"])
        response = self._http.post(path, content=body, headers=headers)
        if response.status_code == 200:
            self._ledger.fault(f"bad: {body[:80]!r} was answered at {path}")
        self._ledger.status("bad", response.status_code, response.text)

    def _look(self) -> None:
        for path in ("/metrics", "/v1/models", "/health"):
            self._ledger.status("look", self._http.get(path).status_code)

    def _connection(self) -> socket.socket:
        host, port = self._server.url.removeprefix("http://").rsplit(":", 1)
        return socket.create_connection((host, int(port)), timeout=SILENCE_SECONDS)


def json_fault(text: str, held: dict[str, Any]) -> str:
    """What is wrong with a document that a response_format asked for; "" if nothing is."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"no JSON ({error})"
    if held["type"] == "json_object":
        return "" if isinstance(value, dict) else "no object"
    schema = held["json_schema"]["schema"]
    if "const" in schema:
        return "" if value == schema["const"] else f"not {schema['const']}"
    right = isinstance(value, dict) and set(value) == {"action", "element"}
    right = right and value["action"] in ("Tap", "Swipe") and len(value["element"]) == 2
    return "" if right and all(type(x) is int and 0 <= x <= 999 for x in value["element"]) else "no action"


def _picture_part(picture: Path, r: random.Random) -> dict[str, Any]:
    with Image.open(picture) as opened:
        image = opened.convert("RGB").resize((r.randrange(60, 200), r.randrange(60, 300)))
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _head(length: int) -> bytes:
    lines = (f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()
