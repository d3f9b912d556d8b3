"""Several clients of one real engine at a time: each gets its own answer, none waits for another's prompt.

python -m pytest tests/test_server_batching.py
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_fixtures import CHAT, Live, image_part, running

from autoglm_edge.embedded import pocket_path, sample_screenshot
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.session import SessionOptions
from autoglm_edge.server.work.answering import ServedEngine

TEXTS = (
    "打开设置",
    "Open the settings",
    "Scroll down",
    "点击登录",
    "Go back",
    "Press the button",
    "返回",
    "Wait",
)


@pytest.fixture(scope="module")
def live(bundle_of: Callable[..., Path]) -> Iterator[Live]:
    bundle = Bundle.open(bundle_of(pocket_path(), "int8"))
    options = SessionOptions(threads=1)
    with running(lambda: ServedEngine(bundle, options=options, concurrency=3)) as live:
        yield live


def body(text: str, **fields: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if len(text) % 2:
        parts.insert(0, image_part(sample_screenshot().read_bytes()))
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 40, "temperature": 0, **fields}


def test_answers_to_many_clients_are_those_that_each_gets_alone(live: Live) -> None:
    """8-bit weights: rows of a run do not round otherwise than a row alone."""
    alone = [live.post(CHAT, body(text)).json()["choices"][0] for text in TEXTS]

    with ThreadPoolExecutor(len(TEXTS)) as pool:
        together = [*pool.map(lambda text: live.post(CHAT, body(text)).json()["choices"][0], TEXTS)]

    assert together == alone


def test_sampled_answers_depend_on_their_own_seed_alone(live: Live) -> None:
    def ask(seed: int) -> str:
        answer = live.post(CHAT, body("Tell me", seed=seed, temperature=1.0)).json()
        text: str = answer["choices"][0]["message"]["content"]
        return text

    alone = [ask(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = [*pool.map(ask, range(6))]

    assert together == alone
    assert len({*alone}) > 1


def test_a_stream_goes_on_while_anothers_prompt_is_read(live: Live) -> None:
    """By the order of what arrives, not by a clock: tokens of the first between the second's two ends."""
    order: list[str] = []
    begun = threading.Event()
    never = {"logit_bias": {str(token): -100 for token in live.service._engine.bundle.manifest.tokens.eos}}  # type: ignore[union-attr]

    def stream(name: str, fields: dict[str, Any]) -> None:
        with live.http.stream("POST", CHAT, json=fields | {"stream": True}, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    order.append(name)
                    begun.set()

    long = "这是一个很长的问题 " * 120
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stream, "first", body("Go", max_tokens=300, **never))
        assert begun.wait(30)
        order.append("asked")
        second = pool.submit(stream, "second", body(long, max_tokens=3))
        first.result()
        second.result()

    between = order[order.index("asked") : order.index("second")]
    assert between.count("first") >= 3


def test_a_short_request_is_answered_before_a_long_prompt_is_read(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long one has begun when the short one comes: its first piece waits until that is there."""
    scheduler = live.service._scheduler
    assert scheduler is not None
    prefill, pieces, begun, ended = Model.prefill_pieces, [], threading.Event(), []

    def watched(model: Model, embeds: np.ndarray, *arguments: Any, **options: Any) -> Iterator[None]:
        pieces.append(embeds.shape[1])
        begun.set()
        deadline = time.monotonic() + 30
        while len(pieces) == 1 and not scheduler.waiting and time.monotonic() < deadline:
            time.sleep(0.001)
        yield from prefill(model, embeds, *arguments, **options)

    monkeypatch.setattr(Model, "prefill_pieces", watched)

    def ask(name: str, text: str) -> dict[str, Any]:
        answer: dict[str, Any] = live.post(CHAT, body(text, max_tokens=2)).json()
        ended.append(name)
        return answer

    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, "long", "Scroll far down, please. " * 400)
        assert begun.wait(30)
        short = pool.submit(ask, "short", "Okay")
        short.result()
        long.result()

    assert ended == ["short", "long"]
    assert len(pieces) > 4
    timings = long.result()["timings"]
    assert timings["waiting_ms"] > 0
    parts = sum(timings[name] for name in ("waiting_ms", "reuse_ms", "image_ms", "prefill_ms"))
    assert parts <= timings["ttft_ms"] + 1


def test_each_of_several_answers_has_its_own_counts(live: Live) -> None:
    answer = live.post(CHAT, body("Tell me a story", n=4, temperature=1.0, seed=1)).json()

    assert len(answer["choices"]) == 4
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] <= 4 * 40
