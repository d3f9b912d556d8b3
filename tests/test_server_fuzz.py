"""Thousands of malformed requests: none is answered with a 500, none ends the server, none stays in it.

    AUTOGLM_FUZZ_REQUESTS=20000 python -m pytest tests/test_server_fuzz.py

Requests begin as good ones of every route and are damaged: fields taken out, put in, given other types and
extreme values, pictures cut, bytes turned, headers and methods changed. Behind them stands the embedded
model, so that tokenizer, template and picture decoders see it all.
"""

from __future__ import annotations

import copy
import http.client
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from server_fixtures import CHAT, Live, data_uri, png, running, wait_until

from autoglm_edge.embedded import pocket_path
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.session import SessionOptions
from autoglm_edge.server.limits import Limits
from autoglm_edge.server.work.answering import ServedEngine

REQUESTS = int(os.environ.get("AUTOGLM_FUZZ_REQUESTS", "2000"))
SEED = int(os.environ.get("AUTOGLM_FUZZ_SEED", "6"))
PICTURES = [
    png(Image.new("RGB", (60, 40), "red")),
    png(Image.new("RGBA", (30, 90), (1, 2, 3, 4))),
    png(Image.new("1", (5, 5))),
]
for _format in ("JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
    _file = io.BytesIO()
    Image.new("RGB", (40, 40), "green").save(_file, _format)
    PICTURES.append(_file.getvalue())

GOOD: list[tuple[str, Any]] = [
    (
        CHAT,
        {
            "messages": [{"role": "user", "content": "go on"}],
            "max_tokens": 4,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "point",
                    "strict": True,
                    "schema": {
                        "type": "object",
                        "properties": {"element": {"type": "array", "items": {"type": "integer"}}},
                        "required": ["element"],
                        "additionalProperties": False,
                    },
                },
            },
        },
    ),
    (
        CHAT,
        {
            "model": "autoglm-phone-9b",
            "messages": [
                {"role": "system", "content": "operate"},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": data_uri(PICTURES[0]), "detail": "auto"}},
                        {"type": "text", "text": "打开设置"},
                    ],
                },
                {"role": "assistant", "content": "<think>x</think><answer>do()</answer>"},
                {"role": "user", "content": "go on"},
            ],
            "max_tokens": 1,
            "temperature": 0.0,
            "top_p": 0.85,
            "frequency_penalty": 0.2,
            "stop": ["x"],
            "logit_bias": {"5": 1},
            "seed": 3,
            "n": 1,
            "stream": False,
            "user": "u",
        },
    ),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 1, "stream": True,
            "stream_options": {"include_usage": True}, "return_reasoning": True, "enable_thinking": True}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 1, "n": 2, "top_k": 5, "min_p": 0.1}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 1}),
    ("/generate", {"text": "x", "image": data_uri(PICTURES[1]), "max_tokens": 1}),
    ("/tokenize", {"prompt": "Hi", "return_token_strs": True}),
    ("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]  # fmt: skip
VALUES: list[Callable[[random.Random], Any]] = [
    lambda r: None,
    lambda r: r.choice([True, False]),
    lambda r: r.choice([0, 1, -1, 2**31, -(2**31), 2**63, 2**64, 10**300, -(10**40), r.randrange(-9, 10**4)]),
    lambda r: r.choice([0.0, -0.0, 1e308, -1e308, 5e-324, 1.5, r.uniform(-3, 3)]),
    lambda r: r.choice(
        ["", "x", "\x00", "\ud800", "😀" * 9, "<|user|>", "<|image|>", "</answer>", "a" * 3000]
    ),
    lambda r: "".join(
        chr(r.choice([r.randrange(32, 127), r.randrange(0x10FFFF)])) for _ in range(r.randrange(30))
    ),
    lambda r: r.choice(
        ["data:image/png;base64,", "/etc/passwd", "http://127.0.0.1/", "file:///dev/zero", "data:,"]
    ),
    lambda r: data_uri(damaged(r, r.choice(PICTURES))),
    lambda r: r.choice([[], {}, [[]], [{}], {"": ""}, [None], [1, "a"], {"type": "text"}, {"a": {"b": [1]}}]),
    lambda r: nested(r.randrange(1, 90)),
]
NAMES = [
    "messages", "model", "content", "role", "type", "text", "image", "image_url", "url", "path", "prompt",
    "n", "max_tokens", "stop", "tools", "logprobs", "response_format", "stream", "chat_template_kwargs",
    "tool_calls", "reasoning_content", "name", "seed", "__proto__", "", "\x00", "constructor", "tokens",
    "best_of", "echo",
]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"content": value}
    return value


def damaged(r: random.Random, data: bytes) -> bytes:
    """Bytes of a file, some of them others."""
    changed = bytearray(data)
    for _ in range(r.randrange(1, 8)):
        changed[r.randrange(len(changed))] = r.randrange(256)
    return bytes(changed[: r.choice([len(changed), r.randrange(len(changed)) + 1])])


def mutate(r: random.Random, value: Any) -> Any:
    """The value with one thing in it changed."""
    if isinstance(value, dict) and value and r.random() < 0.85:
        key = r.choice(list(value))
        what = r.random()
        if what < 0.15:
            del value[key]
        elif what < 0.3:
            value[r.choice(NAMES)] = r.choice(VALUES)(r)
        else:
            value[key] = mutate(r, value[key])
        return value
    if isinstance(value, list) and value and r.random() < 0.85:
        index = r.randrange(len(value))
        if r.random() < 0.2:
            return value * r.randrange(3)
        value[index] = mutate(r, value[index])
        return value
    return r.choice(VALUES)(r)


def body_of(r: random.Random, value: Any) -> bytes:
    """JSON, mostly."""
    text = json.dumps(value, ensure_ascii=r.random() < 0.8)
    data = text.encode("utf-8", "surrogatepass")
    what = r.random()
    if what < 0.08:
        data = damaged(r, data)
    elif what < 0.1:
        data = data.replace(b":", b": NaN, ", 1)
    elif what < 0.12:
        data = data[: r.randrange(len(data))]
    elif what < 0.13:
        data = r.randbytes(r.randrange(200))
    return data


def headers_of(r: random.Random, data: bytes) -> dict[str, str]:
    headers = {"content-type": "application/json", "host": "localhost"}
    if r.random() < 0.05:
        name = r.choice(
            ["content-type", "host", "authorization", "x-request-id", "content-encoding", "accept"]
        )
        headers[name] = r.choice(
            ["", "x", "gzip", "text/plain", "\x7f", "é", "a" * 500, "application/json; x=y"]
        )
    headers["content-length"] = str(len(data))
    return headers


@pytest.fixture(scope="module")
def live(bundle_of: Callable[..., Path]) -> Iterator[Live]:
    bundle = bundle_of(pocket_path(), "int8")

    def load() -> ServedEngine:
        return ServedEngine(
            Bundle.open(bundle), options=SessionOptions(threads=1), context=400, concurrency=3
        )

    with running(load, limits=Limits(body_bytes=200_000)) as live:
        yield live


@pytest.mark.slow
def test_no_request_however_malformed_is_a_fault_of_the_server(live: Live) -> None:
    r = random.Random(SEED)
    connection = http.client.HTTPConnection(*live.address, timeout=60)
    seen: Counter[int] = Counter()
    for number in range(REQUESTS):
        path, good = r.choice(GOOD)
        value = copy.deepcopy(good)
        for _ in range(r.choice([1, 1, 1, 2, 3, 5])):
            value = mutate(r, value)
        data = body_of(r, value)
        method = "POST" if r.random() < 0.98 else r.choice(["GET", "PUT", "DELETE", "HEAD", "OPTIONS"])
        path = path if r.random() < 0.98 else r.choice(["/", "/v1", "/v1/models/%00", "/metrics", path + "/"])
        said = f"request {number} of seed {SEED}: {method} {path} {data[:2000]!r}"
        try:
            connection.request(method, path, body=data, headers=headers_of(r, data))
            response = connection.getresponse()
            text = response.read()
        except (http.client.HTTPException, ConnectionError):
            connection.close()  # a header that is no HTTP: the server hangs up, and serves the next one
            seen[0] += 1
            continue
        seen[response.status] += 1
        assert response.status < 500, said
        if response.status >= 400 and method != "HEAD" and "json" in response.headers["content-type"]:
            assert json.loads(text)["error"]["message"], said
    connection.close()
    print(dict(seen))

    assert live.http.get("/health").status_code == 200
    assert live.chat("Hi", max_tokens=2).status_code == 200
    wait_until(lambda: live.service.gauges()["admitted_requests"][1] == 0)
    assert seen[400] > REQUESTS // 3
    assert seen[200] > REQUESTS // 50, "too few got through to the engine"
    assert seen[0] < REQUESTS // 20
