"""A server in a process of its own, and streams read from it token by token.

In: a bundle and flags of `autoglm serve`. Out: its address; of each streamed answer when its pieces came.
Shared by the benchmark and the soak of the server; knows nothing of what they ask.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

STARTING_SECONDS = 1800.0
"""A large bundle is prepared at its first load."""
_STOPPING_SECONDS = 60.0


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        url: where.
        pid: of its process.
        process: to ask whether it still lives.
    """

    url: str
    pid: int
    process: subprocess.Popen[bytes]


@contextmanager
def server_process(bundle: Path, flags: Sequence[str] = ()) -> Iterator[Running]:
    """Start a server on a free port of this machine; it is stopped at the end of the block.

    Args:
        bundle: to serve.
        flags: more of `autoglm serve`.

    Raises:
        SystemExit: it does not start; says what it wrote.
    """
    command = [sys.executable, "-m", "autoglm_edge", "serve", str(bundle), "--port", "0", *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield Running(_wait(process, log), process.pid, process)
        finally:
            process.terminate()
            try:
                process.wait(_STOPPING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], log: Any) -> str:
    """The address, once /health says that the model is loaded."""
    end = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < end:
        # pread: the child writes at the position that this file object shares with it.
        said = _written(log)
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}:\n{said}")
        found = re.search(r"at (http://\S+), loading", said)
        if found is not None and _healthy(found[1]):
            return found[1]
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready after {STARTING_SECONDS:g} s:\n{_written(log)}")


def _written(log: Any) -> str:
    data = os.pread(log.fileno(), 65536, 0)
    return data.decode(errors="replace")


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@dataclass(frozen=True)
class Streamed:
    """One streamed answer.

    Attributes:
        status: of HTTP.
        sent_s: when the request was sent, by `time.perf_counter`.
        pieces_s: when each piece of text came.
        text: all of them.
        finish_reason: None if the stream ended without one.
        usage: counts; empty if none came.
        error: what an error event or body said; "" if there was none.
    """

    status: int
    sent_s: float
    pieces_s: tuple[float, ...]
    text: str
    finish_reason: str | None
    usage: dict[str, Any]
    error: str = ""


def stream(client: httpx.Client, body: dict[str, Any], *, most: int | None = None) -> Streamed:
    """Ask for a chat answer and read its stream.

    Args:
        client: of the server.
        body: of the request; "stream" and the counts are added.
        most: pieces after which the client goes away; None reads all.
    """
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    sent = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        if response.status_code != 200:
            return Streamed(response.status_code, sent, (), "", None, {}, response.read().decode()[:500])
        return read_events(response.iter_lines(), sent, most=most)


def read_events(lines: Iterable[str], sent_s: float, *, most: int | None = None) -> Streamed:
    """What the lines of a stream say; the time of each is when the iterator gives it."""
    times: list[float] = []
    texts: list[str] = []
    reason: str | None = None
    usage: dict[str, Any] = {}
    error = ""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            error = str(event["error"].get("message", event["error"]))
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            text = choice["delta"].get("content")
            if text:
                times.append(time.perf_counter())
                texts.append(text)
            reason = choice.get("finish_reason") or reason
        if most is not None and len(times) >= most:
            break
    return Streamed(200, sent_s, tuple(times), "".join(texts), reason, usage, error)
