"""Every route over real HTTP, in front of a scripted engine: forms, counts, refusals by name."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from server_fixtures import (
    CHAT,
    HI,
    Live,
    ScriptedEngine,
    data_uri,
    events_of,
    image_part,
    png,
    running,
    text_of,
)

from autoglm_edge.server.asking.options import NOTED, UNSUPPORTED
from autoglm_edge.server.gate.access import Keys
from autoglm_edge.server.limits import Limits

PICTURE = png(Image.new("RGB", (56, 56), "red"))


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Live, ScriptedEngine]]:
    engine = ScriptedEngine()
    with running(lambda: engine) as live:
        yield live, engine
    assert engine.closed


@pytest.fixture
def engine(shared: tuple[Live, ScriptedEngine]) -> ScriptedEngine:
    shared[1].script = shared[1].error = None
    shared[1].thinking = []
    return shared[1]


@pytest.fixture
def live(shared: tuple[Live, ScriptedEngine], engine: ScriptedEngine) -> Live:
    return shared[0]


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response, which is in OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) <= 600
    found: dict[str, Any] = error
    return found


# --- answers


def test_a_chat_is_answered_in_one_document(live: Live) -> None:
    response = live.chat("hello", model="autoglm-phone-9b")
    document = response.json()

    assert response.status_code == 200
    assert document["object"] == "chat.completion"
    assert document["id"].startswith("chatcmpl-")
    assert document["model"] == "autoglm-phone-9b"
    assert document["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert document["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 0},
    }
    assert document["timings"]["ttft_ms"] == 3.0
    assert document["timings"]["queue_ms"] >= 0


def test_the_first_chunk_with_content_is_the_first_token_and_brings_the_role(live: Live) -> None:
    events = events_of(live.chat("abc", stream=True))
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]

    assert events[-1] == "[DONE]"
    assert deltas == [{"role": "assistant", "content": "a"}, {"content": "b"}, {"content": "c"}, {}]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, None, "stop"]
    assert len({event["id"] for event in events[:-1]}) == 1
    assert all("usage" not in event for event in events[:-1])
    assert events[-2]["timings"]["decoded_tokens"] == 2


def test_pieces_without_text_make_no_chunk(live: Live, engine: ScriptedEngine) -> None:
    engine.script = ["", "", "世", "", "界"]

    assert [event["choices"][0]["delta"] for event in events_of(live.chat(stream=True))[:-1]] == [
        {"role": "assistant", "content": "世"},
        {"content": "界"},
        {},
    ]


def test_an_answer_without_text_still_has_a_role_and_an_end(live: Live, engine: ScriptedEngine) -> None:
    engine.script = []
    events = events_of(live.chat(stream=True))

    assert events[0]["choices"][0]["delta"] == {"role": "assistant"}
    assert events[0]["choices"][0]["finish_reason"] == "stop"


def test_a_stream_ends_with_the_counts_if_asked(live: Live) -> None:
    events = events_of(live.chat("abc", stream=True, stream_options={"include_usage": True}))

    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["total_tokens"] == 6
    assert all(event["usage"] is None for event in events[:-2])


def test_a_stream_begins_with_a_comment_at_once(live: Live, engine: ScriptedEngine) -> None:
    engine.gate.clear()
    try:
        with live.http.stream("POST", CHAT, json=HI | {"stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            pieces = response.iter_raw()
            assert next(pieces) == b": accepted\n\n"
            engine.gate.set()
            assert b"[DONE]" in b"".join(pieces)
    finally:
        engine.gate.set()


def test_the_length_ends_an_answer(live: Live) -> None:
    choice = live.chat("abcdef", max_tokens=2).json()["choices"][0]

    assert (choice["message"]["content"], choice["finish_reason"]) == ("ab", "length")
    assert live.chat("abcdef", max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_several_answers_have_an_index_each_and_one_prompt(live: Live) -> None:
    document = live.chat("xy", n=3).json()

    assert [choice["index"] for choice in document["choices"]] == [0, 1, 2]
    assert document["usage"]["prompt_tokens"] == 2
    assert document["usage"]["completion_tokens"] == 6

    events = events_of(live.chat("xy", n=2, stream=True, stream_options={"include_usage": True}))
    assert [text_of(events, index=index) for index in (0, 1)] == ["xy", "xy"]
    firsts = [e["choices"][0] for e in events[:-2] if e["choices"][0]["delta"].get("role")]
    assert [choice["index"] for choice in firsts] == [0, 1]


def test_thinking_stays_in_the_content_unless_it_is_told_apart(live: Live, engine: ScriptedEngine) -> None:
    engine.script = ["<thi", "nk>why", "</thi", "nk>\n<ans", "wer>", 'do(action="Back")']

    plain = live.chat().json()["choices"][0]["message"]
    apart = live.chat(return_reasoning=True).json()["choices"][0]["message"]
    events = events_of(live.chat(return_reasoning=True, stream=True))

    assert plain["content"] == "".join(engine.script)
    assert "reasoning_content" not in plain
    assert (apart["reasoning_content"], apart["content"]) == ("why", 'do(action="Back")')
    assert text_of(events, "reasoning_content") == "why"
    assert text_of(events) == 'do(action="Back")'
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "reasoning_content": "why"}


def test_enable_thinking_reaches_the_prompt(live: Live, engine: ScriptedEngine) -> None:
    live.chat()
    live.chat(enable_thinking=False)
    live.chat(chat_template_kwargs={"enable_thinking": True})

    assert engine.thinking == [None, False, True]
    both = live.chat(enable_thinking=True, chat_template_kwargs={"enable_thinking": False})
    assert refusal(both)["param"] == "enable_thinking"


def test_texts_and_ids_are_continued(live: Live) -> None:
    document = live.post("/v1/completions", {"prompt": ["abc", "de"], "n": 2}).json()

    assert document["object"] == "text_completion"
    assert [choice["text"] for choice in document["choices"]] == ["abc", "abc", "de", "de"]
    assert document["usage"]["prompt_tokens"] == 5
    ids = live.post("/v1/completions", {"prompt": [104, 105]}).json()
    assert ids["choices"][0]["text"] == "hi"
    long = live.post("/v1/completions", {"prompt": "x" * 40}).json()
    assert long["usage"]["completion_tokens"] == 16
    events = events_of(live.post("/v1/completions", {"prompt": "abc", "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "abc"


def test_generate_takes_a_text_and_a_picture_and_reads_the_action(live: Live, engine: ScriptedEngine) -> None:
    engine.script = ["<think>x</think><answer>", 'do(action="Back")']
    for image in (data_uri(PICTURE), data_uri(PICTURE).partition(",")[2], [data_uri(PICTURE)] * 2):
        document = live.post("/generate", {"text": "go", "image": image}).json()

        assert document["thinking"] == "x"
        assert document["action"] == {"type": "Back"}
        assert document["finish_reason"] == "stop"
    assert refusal(live.post("/generate", {"image": "no base64!"}))["code"] == "invalid_image"
    assert refusal(live.post("/generate", {}))["param"] == "text"
    assert refusal(live.post("/generate", {"text": "x", "stream": True}))["param"] == "stream"


def test_tokens_are_counted_and_shown(live: Live) -> None:
    shown = live.post("/tokenize", {"prompt": "hé", "return_token_strs": True}).json()
    assert shown == {"count": 2, "max_model_len": 1000, "tokens": [104, 233], "token_strs": ["h", "é"]}
    assert live.post("/tokenize", {"content": "abc"}).json()["count"] == 3
    assert live.post("/tokenize", HI).json()["tokens"] == [72, 105]
    assert live.post("/detokenize", {"tokens": [72, 105]}).json() == {"prompt": "Hi"}
    assert refusal(live.post("/detokenize", {"tokens": [2**30]}))["param"] == "tokens"
    assert refusal(live.post("/tokenize", {}))["code"] == "missing_field"
    assert refusal(live.post("/tokenize", {"prompt": "x", "content": "y"}))["code"] == "missing_field"


def test_models_are_listed_by_all_their_names(live: Live) -> None:
    listed = live.http.get("/v1/models").json()

    assert [model["id"] for model in listed["data"]] == ["pocket", "autoglm-phone-9b"]
    assert listed["data"][0]["max_model_len"] == 1000
    assert live.http.get("/v1/models/pocket").json()["id"] == "pocket"
    assert refusal(live.http.get("/v1/models/a/b"), 404)["code"] == "model_not_found"
    error = refusal(live.chat(model="gpt-9"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "autoglm-phone-9b" in error["message"]


# --- refusals


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_is_not_supported_is_refused_by_name_and_its_empty_values_are_taken(
    live: Live, name: str
) -> None:
    harmless, _ = UNSUPPORTED[name]

    error = refusal(live.chat(**{name: {"ask": "for something"}}))

    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    for value in (None, *harmless):
        assert live.chat(**{name: value}).status_code == 200, (name, value)


def test_fields_that_change_nothing_are_taken_with_their_type(live: Live) -> None:
    values: dict[type, Any] = {dict: {"a": "b"}, str: "x", bool: True}
    for name, kind in NOTED.items():
        assert live.chat(**{name: values[kind]}).status_code == 200
        assert refusal(live.chat(**{name: 1.5}))["param"] == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": []}, "presence_penalty"),
        ({"seed": 1e3}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"logit_bias": {"x": 1}}, None),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"2000000": 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5.0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 513}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"extra": 1}}, "extra"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "text", "schema": {}}}, "schema"),
        ({"response_format": "text"}, None),
        ({"enable_thinking": "no"}, "enable_thinking"),
        ({"return_reasoning": 1}, "return_reasoning"),
        ({"chat_template_kwargs": {"other": 1}}, "other"),
        ({"model": 1}, "model"),
        ({"user": 7}, "user"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(
    live: Live, fields: dict[str, Any], param: str | None
) -> None:
    assert refusal(live.chat(**fields))["param"] == param


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        {},
        "hi",
        ["hi"],
        [{"role": "user"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": "x", "tool_calls": [1]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "lone \ud800 surrogate"}],
        [{"role": "assistant", "content": ["x"], "reasoning_content": "y"}],
        [{"role": "assistant", "content": "x", "reasoning_content": 5}],
    ],
)
def test_wrong_messages_are_refused(live: Live, messages: Any) -> None:
    body = json.dumps({"messages": messages}).encode()

    refusal(live.http.post(CHAT, content=body, headers={"content-type": "application/json"}))


def test_the_developer_is_the_system_and_a_thought_goes_back_where_it_came_from(live: Live) -> None:
    history = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "do()", "reasoning_content": "why"},
    ]

    ids = live.post("/tokenize", {"messages": history}).json()["tokens"]

    assert "".join(map(chr, ids)) == "<think>why</think><answer>do()</answer>"


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "../secret.png",
        "data:text/plain;base64,aGk=",
        "data:image/png,rawbytes",
        "data:image/png;base64,####",
        "data:image/png;base64,aGVsbG8=",
        "data:",
        "http://127.0.0.1/x.png",
        "https://example.org/x.png",
        "ftp://example.org/x.png",
        "",
    ],
)
def test_a_picture_is_a_data_uri_and_nothing_else(live: Live, url: str) -> None:
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": url},
    ):
        error = refusal(live.post(CHAT, {"messages": [{"role": "user", "content": [part]}]}))
        assert error["code"] == "invalid_image"


@pytest.mark.parametrize("key", ["path", "url"])
def test_no_other_key_of_a_picture_names_a_file(live: Live, key: str) -> None:
    part = {"type": "image", "image": data_uri(PICTURE), key: "/etc/passwd"}

    assert (
        "cannot see"
        in refusal(live.post(CHAT, {"messages": [{"role": "user", "content": [part]}]}))["message"]
    )


def test_the_detail_of_a_picture_is_the_servers_choice(live: Live) -> None:
    def ask(detail: str) -> httpx.Response:
        part = {"type": "image_url", "image_url": {"url": data_uri(PICTURE), "detail": detail}}
        text = {"type": "text", "text": "x"}
        return live.post(CHAT, {"messages": [{"role": "user", "content": [part, text]}]})

    assert ask("auto").status_code == ask("high").status_code == 200
    assert "detail" in refusal(ask("low"))["message"]


def test_what_does_not_fit_the_context_is_refused_with_the_counts_before_any_work(
    live: Live, engine: ScriptedEngine
) -> None:
    before = len(engine.begun)

    error = refusal(live.chat("x" * 990, max_tokens=20, stream=True))

    assert error["code"] == "context_length_exceeded"
    assert re.findall(r"\d+", error["message"])[:3] == ["990", "20", "1000"]
    assert len(engine.begun) == before


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"temperature": Infinity, "messages": []}',
        b'{"a": 1, "a": 2}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 200 + b"1" + b"}" * 200,
        b"[" + b"1," * 300_000 + b"1]",
        b'{"temperature": 1e999, "messages": []}',
    ],
)
def test_a_body_that_is_no_json_object_is_refused(live: Live, body: bytes) -> None:
    for path in (CHAT, "/v1/completions", "/generate", "/tokenize", "/detokenize"):
        refusal(live.http.post(path, content=body, headers={"content-type": "application/json"}))


def test_bodies_of_another_type_are_refused_because_pages_may_send_them(live: Live) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        response = live.http.post(CHAT, content=json.dumps(HI), headers={"content-type": kind})
        assert refusal(response, 415)["code"] == "wrong_content_type"
    kind = "application/json; charset=utf-8"
    assert live.http.post(CHAT, content=json.dumps(HI), headers={"content-type": kind}).status_code == 200


def test_unknown_paths_and_methods_are_refused_in_the_same_form(live: Live) -> None:
    refusal(live.http.get("/nothing"), 404)
    refusal(live.http.get("/docs"), 404)
    refusal(live.http.get("/openapi.json"), 404)
    refusal(live.http.post("/nothing"), 404)
    response = live.http.get(CHAT)
    refusal(response, 405)
    assert response.headers["allow"] == "POST"


def test_every_response_names_its_request(live: Live) -> None:
    for response in (live.chat(), live.http.get("/nothing"), live.chat(n=0), live.http.get("/health")):
        assert re.fullmatch(r"req-[0-9a-f]{32}", response.headers["x-request-id"])
    own = live.http.get("/health", headers={"x-request-id": "my.own-7"})
    assert own.headers["x-request-id"] == "my.own-7"
    forged = live.http.get("/health", headers={"x-request-id": "a b\t<script>"})
    assert forged.headers["x-request-id"].startswith("req-")


def test_another_host_is_refused_where_no_key_protects(live: Live) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "127.1", ""):
        assert refusal(live.http.get("/v1/models", headers={"host": host}), 421)["code"] == "wrong_host"
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
        assert live.http.get("/v1/models", headers={"host": host}).status_code == 200


def test_no_page_may_read_unless_its_origin_is_named(live: Live) -> None:
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}

    assert not [name for name in live.http.options(CHAT, headers=asked).headers if "access-control" in name]

    with running(ScriptedEngine, origins=("https://app.example",), keys=Keys(["secret-key"])) as other:
        allowed = other.http.options(CHAT, headers=asked).headers
        assert allowed["access-control-allow-origin"] == "https://app.example"
        denied = other.http.get("/health", headers={"origin": "https://evil.example"}).headers
        assert "access-control-allow-origin" not in denied


# --- limits


def test_sizes_are_limited() -> None:
    small = Limits(
        body_bytes=20_000, messages=3, parts=4, images=2, image_bytes=2_000, image_pixels=10_000,
        request_pixels=15_000, text_bytes=500,
    )  # fmt: skip
    plain = png(Image.new("RGB", (90, 90)))

    def ask(live: Live, *parts: Any) -> httpx.Response:
        return live.post(CHAT, {"messages": [{"role": "user", "content": [*parts]}]})

    with running(ScriptedEngine, limits=small) as live:
        text = {"type": "text", "text": "x"}
        assert ask(live, image_part(plain), text).status_code == 200
        assert "pixels together" in refusal(ask(live, *[image_part(plain)] * 2))["message"]
        assert refusal(ask(live, *[image_part(PICTURE)] * 3))["code"] == "too_many_images"
        assert "scale it down" in refusal(ask(live, image_part(bomb(90000, 90000))))["message"]
        assert "9000x9000 pixels" in refusal(ask(live, image_part(bomb(9000, 9000))))["message"]
        noise = png(Image.effect_noise((90, 90), 90))
        assert "2000 bytes" in refusal(ask(live, image_part(noise)))["message"]
        assert "parts" in refusal(ask(live, *[text] * 5))["message"]
        assert refusal(live.post(CHAT, {"messages": HI["messages"] * 4}))["param"] == "messages"
        assert refusal(live.chat("x" * 501))["code"] == "context_length_exceeded"
        assert refusal(live.chat("x" * 20_000), 413)["code"] == "body_too_large"

        def chunks() -> Iterator[bytes]:
            yield from [b" " * 5_000] * 10

        unannounced = live.http.post(CHAT, content=chunks(), headers={"content-type": "application/json"})
        assert refusal(unannounced, 413)["code"] == "body_too_large"
        assert live.chat().status_code == 200


def bomb(width: int, height: int) -> bytes:
    """A picture whose header promises more pixels than its bytes hold."""
    data = bytearray(PICTURE)
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_a_body_that_does_not_come_is_given_up() -> None:
    with running(ScriptedEngine, limits=Limits(body_seconds=0.2)) as live:
        head = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with live.raw(head + b"content-length: 100\r\n\r\n{") as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        with live.raw(head + b"content-length: 100\r\n\r\n{"):
            pass  # hangs up instead
        assert live.chat().status_code == 200


# --- keys


def test_a_key_is_asked_for_everywhere_but_at_health() -> None:
    with running(ScriptedEngine, keys=Keys(["first-key", "second-key"]), hosts=None) as live:
        for path in ("/v1/models", "/metrics", "/nothing"):
            response = live.http.get(path)
            assert refusal(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for header in ("Bearer wrong-key", "Basic first-key", "first-key", "Bearer", "Bearer first-key2"):
            refusal(live.post(CHAT, HI, headers={"authorization": header}), 401)
        for header in ("Bearer first-key", "bearer second-key", "Bearer  first-key"):
            assert live.post(CHAT, HI, headers={"authorization": header}).status_code == 200
        assert live.http.get("/health").status_code == 200
        big = b"x" * 3_000_000
        refusal(live.http.post(CHAT, content=big, headers={"content-type": "application/json"}), 401)


# --- what goes wrong within


def test_a_failure_within_says_nothing_of_it_and_the_next_answer_comes(
    live: Live, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.error = RuntimeError("holds secret words")

    response = live.chat("private text")
    error = refusal(response, 500)
    events = events_of(live.chat("private text", stream=True))

    assert error["code"] == "internal_error"
    assert response.headers["x-request-id"] in error["message"]
    assert events[-1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text + caplog.text
    assert "private" not in caplog.text
    engine.error = None
    assert live.chat("next").json()["choices"][0]["message"]["content"] == "next"


def test_a_metric_follows_what_is_served(live: Live) -> None:
    before = live.metric("autoglm_completion_tokens_total")
    live.chat("12345")

    text = live.http.get("/metrics").text
    assert live.metric("autoglm_completion_tokens_total") == before + 5
    assert live.metric('autoglm_requests_total{route="/v1/chat/completions",status="200"}') >= 1
    assert "autoglm_memory_anonymous_bytes" in text
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) autoglm_\w+ .+|autoglm_\w+(\{[^{}]*\})? -?\d+(\.\d+)?", line), (
            line
        )
    buckets = re.findall(r'ttft_seconds_bucket\{le="([^"]+)"\} (\d+)', text)
    counts = [int(count) for _, count in buckets]
    assert counts == sorted(counts)
    assert buckets[-1][0] == "+Inf"
    assert f"autoglm_ttft_seconds_count {counts[-1]}" in text


def test_paths_of_strangers_are_one_name_in_the_metrics(live: Live) -> None:
    for index in range(5):
        live.http.get(f"/made-up-{index}")

    assert "made-up" not in live.http.get("/metrics").text
