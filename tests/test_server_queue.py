"""Who waits, who is turned away, and that nobody's work outlives them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_fixtures import CHAT, HI, ScriptedEngine, events_of, running, text_of, wait_until

from autoglm_edge.errors import BundleError
from autoglm_edge.server.limits import Limits
from autoglm_edge.server.work.fair_queue import FairQueue


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def request_bytes(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


# --- the queue alone


def test_clients_take_turns_and_each_ones_requests_keep_their_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for client, item in [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")]:
        queue.push(client, item)

    assert [queue.pop() for _ in range(7)] == ["a1", "b1", "c1", "a2", "b2", "a3", None]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["push", "pop", "remove"]))))
def test_a_queue_loses_nothing_and_keeps_each_clients_order(steps: list[tuple[str, str]]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    waiting: list[tuple[str, int]] = []
    for number, (client, what) in enumerate(steps):
        if what == "push":
            queue.push(client, (client, number))
            waiting.append((client, number))
        elif what == "pop":
            item = queue.pop()
            assert (item is None) == (not waiting)
            if item is not None:
                assert item == next(other for other in waiting if other[0] == item[0])
                waiting.remove(item)
        else:
            item = (client, number - 1)
            assert queue.remove(item) == (item in waiting)
            waiting = [other for other in waiting if other != item]
        assert len(queue) == len(waiting)
    assert sorted(queue.clear()) == sorted(waiting)
    assert len(queue) == 0


# --- a server's queue


def test_answers_are_given_one_at_a_time_and_users_take_turns(
    engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    with running(lambda: engine) as live:
        engine.gate.clear()
        futures = [pool.submit(live.chat, "first", user="a")]
        wait_until(lambda: engine.begun == ["first"])
        for number, (text, user) in enumerate([("a2", "a"), ("a3", "a"), ("b1", "b")], 1):
            futures.append(pool.submit(live.chat, text, user=user))
            wait_until(lambda: live.service.gauges()["queued_requests"][1] == number)  # noqa: B023
        assert engine.begun == ["first"]
        assert live.service.gauges()["running_requests"][1] == 1

        engine.gate.set()
        said = [future.result().json()["choices"][0]["message"]["content"] for future in futures]

    assert said == ["first", "a2", "a3", "b1"]
    assert engine.begun == ["first", "a2", "b1", "a3"]


def test_more_than_may_wait_are_turned_away_and_the_others_are_served(
    engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    with running(lambda: engine, limits=Limits(queue=2)) as live:
        engine.gate.clear()
        futures = [pool.submit(live.chat, f"n{number}") for number in range(3)]
        wait_until(lambda: live.service.gauges()["admitted_requests"][1] == 3)

        refused = live.chat("one too many")

        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1"
        assert live.http.get("/health").status_code == 200
        assert live.http.get("/v1/models").status_code == 200
        engine.gate.set()
        assert [future.result().status_code for future in futures] == [200] * 3
        assert live.chat("now").status_code == 200


# --- several answers at a time


def test_as_many_answers_are_given_at_a_time_as_the_engine_can(
    engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    engine.concurrency = 2
    with running(lambda: engine, limits=Limits(queue=1)) as live:
        engine.gate.clear()
        futures = [pool.submit(live.chat, text) for text in ("one", "two", "three")]
        wait_until(lambda: live.service.gauges()["admitted_requests"][1] == 3)
        refused = live.chat("four")
        engine.gate.set()
        said = {future.result().json()["choices"][0]["message"]["content"] for future in futures}

    assert refused.status_code == 429
    assert said == {"one", "two", "three"}


def test_answers_of_one_request_are_given_together_and_in_their_places(engine: ScriptedEngine) -> None:
    engine.concurrency = 3
    with running(lambda: engine) as live:
        whole = live.post("/v1/completions", {"prompt": ["ab", "cd", "ef"], "n": 2, "max_tokens": 9})
        events = events_of(live.chat("xyz", n=5, stream=True))

    texts = [choice["text"] for choice in whole.json()["choices"]]
    assert texts == ["ab", "ab", "cd", "cd", "ef", "ef"]
    assert [text_of(events, index=index) for index in range(5)] == ["xyz"] * 5


def test_an_answer_that_fails_takes_its_request_with_it_and_no_other(
    engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    engine.concurrency = 4
    pieces = engine._pieces

    def sometimes(said: str, *arguments: Any) -> Iterator[Any]:
        first, *rest = pieces(said, *arguments)
        yield first
        if said == "bad":
            raise RuntimeError("a graph failed")
        yield from rest

    engine._pieces = sometimes  # type: ignore[method-assign]
    with running(lambda: engine) as live:
        answers = [
            pool.submit(live.chat, text, n=3)
            for text in ("good", "bad", "fine", "bad", "well", "bad", "done")
        ]
        codes = [answer.result().status_code for answer in answers]
        wait_until(lambda: live.service.gauges()["admitted_requests"][1] == 0)

    assert codes == [200, 500, 200, 500, 200, 500, 200]


# --- clients that go away


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_work_within_one_step(engine: ScriptedEngine, stream: bool) -> None:
    with running(lambda: engine) as live:
        engine.gate.clear()
        connection = live.raw(request_bytes(HI | {"stream": stream}))
        wait_until(lambda: engine.begun)

        connection.close()
        wait_until(lambda: engine.ended)

        assert engine.ended == [("Hi", True)]
        engine.gate.set()
        assert live.chat("next").json()["choices"][0]["message"]["content"] == "next"
        wait_until(lambda: live.service.gauges()["admitted_requests"][1] == 0)
        assert live.metric('autoglm_answers_total{finish="cancelled"}') == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_while_it_waits_is_never_answered(
    engine: ScriptedEngine, stream: bool
) -> None:
    with running(lambda: engine) as live:
        engine.gate.clear()
        first = live.raw(request_bytes(HI))
        wait_until(lambda: engine.begun)
        waiting = live.raw(request_bytes({"messages": [{"role": "user", "content": "B"}], "stream": stream}))
        wait_until(lambda: live.service.gauges()["queued_requests"][1] == 1)

        waiting.close()
        wait_until(lambda: live.service.gauges()["queued_requests"][1] == 0)
        engine.gate.set()
        assert b"200 OK" in first.recv(100)
        first.close()

    assert engine.begun == ["Hi"]


def test_all_of_several_answers_end_with_their_client(engine: ScriptedEngine) -> None:
    with running(lambda: engine) as live:
        engine.gate.clear()
        connection = live.raw(request_bytes(HI | {"n": 5, "stream": True}))
        wait_until(lambda: engine.begun)
        connection.close()
        wait_until(lambda: live.service.gauges()["running_requests"][1] == 0)

    assert engine.begun == ["Hi"]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_many_clients_that_come_and_go_leave_nothing_behind(
    engine: ScriptedEngine, pool: ThreadPoolExecutor, concurrency: int
) -> None:
    engine.concurrency = concurrency
    with running(lambda: engine, limits=Limits(queue=100)) as live:

        def come_and_go(number: int) -> str:
            body = {"messages": [{"role": "user", "content": f"marker-{number}-" + "x" * 20}]}
            if number % 3 == 0:
                with live.raw(request_bytes(body | {"stream": number % 2 == 0})):
                    time.sleep(0.001 * (number % 7))
                return "gone"
            text: str = live.post(CHAT, body | {"stream": number % 2 == 0}).text
            return text

        texts = list(pool.map(come_and_go, range(90)))
        wait_until(lambda: live.service.gauges()["admitted_requests"][1] == 0)
        assert live.chat("fine").status_code == 200

    for number, text in enumerate(texts):
        if number % 3 == 0:
            continue
        if number % 2 == 0:
            said = "".join(
                choice["delta"].get("content") or ""
                for event in events_of(httpx.Response(200, text=text))[:-1]
                for choice in event["choices"]
            )
        else:
            said = json.loads(text)["choices"][0]["message"]["content"]
        assert said == f"marker-{number}-" + "x" * 20, "an answer went to another client"


# --- signs of life


def test_comments_flow_while_nothing_else_does(engine: ScriptedEngine) -> None:
    with running(lambda: engine, ping_s=0.05) as live:
        engine.gate.clear()
        with live.http.stream("POST", CHAT, json=HI | {"stream": True}) as response:
            seen = b""
            for piece in response.iter_raw():
                seen += piece
                if seen.count(b": working\n\n") == 3:
                    engine.gate.set()
        assert seen.startswith(b": accepted\n\n")
        assert seen.endswith(b"data: [DONE]\n\n")
        assert seen.index(b": working") < seen.index(b"data:")


def test_a_document_that_takes_long_begins_with_line_breaks(engine: ScriptedEngine) -> None:
    with running(lambda: engine, ping_s=0.05, patience_s=0.1) as live:
        engine.gate.clear()
        threading.Timer(0.5, engine.gate.set).start()
        response = live.chat("slow")

        assert response.text.startswith("\n\n")
        assert response.json()["choices"][0]["message"]["content"] == "slow"
        assert live.chat("quick").text.startswith("{")


def test_a_failure_after_the_first_line_break_is_no_answer(engine: ScriptedEngine) -> None:
    def fail(*arguments: Any) -> Iterator[Any]:
        engine.gate.wait(30)
        raise RuntimeError

    engine._pieces = fail  # type: ignore[method-assign]
    with running(lambda: engine, ping_s=0.02, patience_s=0.02) as live:
        engine.gate.clear()
        threading.Timer(0.3, engine.gate.set).start()
        with pytest.raises(httpx.RemoteProtocolError):
            live.chat()
        assert live.http.get("/health").status_code == 200


# --- loading and stopping


def test_health_tells_when_the_model_is_there(engine: ScriptedEngine) -> None:
    gate = threading.Event()

    def load() -> ScriptedEngine:
        gate.wait(30)
        return engine

    with running(load, wait=False) as live:
        health = live.http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        refused = live.chat()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "model_loading"
        assert live.http.get("/v1/models").status_code == 503
        assert live.metric("autoglm_ready") == 0

        gate.set()
        wait_until(lambda: live.service.state == "ready")
        assert live.http.get("/health").json() == {"status": "ok"}
        assert live.metric("autoglm_ready") == 1
        assert live.chat().status_code == 200


def test_an_engine_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> ScriptedEngine:
        raise BundleError("it is damaged")

    with running(load) as live:
        wait_until(lambda: live.server.should_exit)

        assert isinstance(live.service.error, BundleError)


def test_a_server_that_stops_lets_the_answer_under_way_end_and_sends_the_others_away(
    engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    with running(lambda: engine) as live:
        engine.gate.clear()
        under_way = pool.submit(live.chat, "under way")
        wait_until(lambda: engine.begun)
        waiting = pool.submit(live.chat, "waiting")
        wait_until(lambda: live.service.gauges()["queued_requests"][1] == 1)

        live.server.should_exit = True
        refused = waiting.result()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_stopping"
        engine.gate.set()

        assert under_way.result().json()["choices"][0]["message"]["content"] == "under way"
    assert engine.begun == ["under way"]
    assert engine.closed


def test_an_answer_that_outlives_the_grace_is_ended_and_says_so(
    engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    with running(lambda: engine, grace_s=0.2) as live:
        engine.gate.clear()
        stream = pool.submit(live.chat, "endless", stream=True)
        wait_until(lambda: engine.begun)

        live.server.should_exit = True
        events = events_of(stream.result())

    assert events[-1]["error"]["code"] == "server_stopping"
    assert engine.ended == [("endless", True)]
    assert engine.closed


def test_a_client_that_reads_nothing_is_left_alone(engine: ScriptedEngine) -> None:
    engine.script = ["x" * 100_000] * 300
    with running(lambda: engine, limits=Limits(send_seconds=0.3)) as live:
        with live.raw(request_bytes(HI | {"stream": True})):
            wait_until(lambda: engine.begun)
            wait_until(lambda: live.service.gauges()["admitted_requests"][1] == 0)
        assert engine.ended[0][0] == "Hi"
        engine.script = None
        assert live.chat("next").status_code == 200


def test_an_answer_and_a_failure_of_another_request_do_not_mix(
    engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    with running(lambda: engine) as live:
        engine.gate.clear()
        good = pool.submit(live.chat, "good", stream=True)
        wait_until(lambda: engine.begun)
        bad = [pool.submit(live.chat, "private-bad", **{"stop": 5}) for _ in range(5)]
        assert {future.result().status_code for future in bad} == {400}
        engine.gate.set()
        response = good.result()

    assert events_of(response)[-1] == "[DONE]"
    assert "private" not in response.text
