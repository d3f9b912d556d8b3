"""Files of requests: what a line may be, what stands in the output, and what a run finds after a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from server_fixtures import ScriptedEngine, data_uri, png

from autoglm_edge.commands.batch_progress import BatchProgress
from autoglm_edge.commands.run import run
from autoglm_edge.embedded import pocket_path
from autoglm_edge.errors import EdgeError, RequestError
from autoglm_edge.offline.answers import ahead, answer_lines
from autoglm_edge.offline.batch import MOST_FAULTS, Summary, answer_file
from autoglm_edge.offline.job import Rules
from autoglm_edge.offline.output import Output, id_of
from autoglm_edge.offline.pictures import with_pictures
from autoglm_edge.offline.record import Answered
from autoglm_edge.offline.request import name_of, read_request
from autoglm_edge.offline.source import Line, Source
from autoglm_edge.runtime.opening import Opening
from autoglm_edge.server.limits import Limits
from autoglm_edge.server.problem import ApiError
from autoglm_edge.server.work.answering import ServedEngine

LIMITS = Limits()
RULES = Rules(("pocket", "autoglm-phone-9b"))
ABOUT = {"input_sha256": "0" * 64, "bundle": "b", "context": None}


def chat(text: str, name: str | None = None, **fields: Any) -> dict[str, Any]:
    """A line of OpenAI's form."""
    body = {"messages": [{"role": "user", "content": text}]} | fields
    line: dict[str, Any] = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    return line if name is None else {"custom_id": name} | line


def written(path: Path, *lines: Any) -> Path:
    """A file of those lines; strings and bytes as they are."""
    data = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answers_of(engine: ScriptedEngine, *lines: Any, rules: Rules = RULES) -> list[dict[str, Any]]:
    """What stands in the output for lines."""
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    found = answer_lines(engine, rules, [Line(number, item) for number, item in enumerate(data, 1)])
    return [json.loads(item.record) for item in found]


class Told:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.start: tuple[int, int, int] | None = None
        self.items: list[Answered] = []

    def began(self, requests: int, before: int, repaired_bytes: int) -> None:
        self.start = (requests, before, repaired_bytes)

    def answered(self, item: Answered) -> None:
        self.items.append(item)


# --- lines


def test_a_line_of_openais_form_and_a_bare_body_are_requests() -> None:
    whole = read_request(json.dumps(chat("Hi", "a")).encode(), 3, LIMITS)
    bare = read_request(b'{"id": "b", "prompt": "x"}', 4, LIMITS)
    nameless = read_request(b'{"messages": []}', 5, LIMITS)

    assert (whole.name, whole.kind, whole.body["messages"][0]["content"]) == ("a", "chat", "Hi")
    assert (bare.name, bare.kind, bare.body) == ("b", "completion", {"prompt": "x"})
    assert (nameless.name, nameless.kind) == ("line-5", "chat")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("[1]", "a list"),
        ("{}", "neither messages nor prompt"),
        ('{"messages": [], "prompt": ""}', "both"),
        ('{"custom_id": "a", "body": {}}', "url"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "/v1/embeddings"),
        ('{"custom_id": "a", "url": ["/v1/completions"], "body": {}}', "url is a list"),
        ('{"custom_id": "a", "url": "/v1/completions", "method": "GET", "body": {}}', "method"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": []}', "body"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {}, "extra": 1}', "extra"),
        ('{"custom_id": 7, "url": "/v1/completions", "body": {}}', "custom_id"),
        ('{"custom_id": "", "url": "/v1/completions", "body": {}}', "empty"),
        ('{"id": 7, "prompt": "x"}', "id"),
        ('{"id": "' + "a" * 600 + '", "prompt": "x"}', "600"),
        ('{"prompt": NaN}', "NaN"),
        ('{"prompt": 1, "prompt": 2}', "twice"),
        ("[" * 100_000, "JSON"),
        ("\x00", "JSON"),
    ],
)
def test_a_line_that_is_no_request_is_refused_by_name(line: str, word: str) -> None:
    with pytest.raises(ApiError) as refusal:
        read_request(line.encode(), 1, LIMITS)

    assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


@given(st.binary(max_size=60) | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps))
@settings(max_examples=200, deadline=None)
def test_whatever_a_line_is_it_is_a_request_or_refused(line: bytes | str) -> None:
    data = line if isinstance(line, bytes) else line.encode()

    name = name_of(data, 1, LIMITS)
    assert name is None or isinstance(name, str)
    try:
        assert read_request(data, 1, LIMITS).name == name
    except ApiError as problem:
        assert 400 <= problem.status < 500


# --- the input file


def test_lines_are_found_again_by_their_number_whatever_stands_between(tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbf" + json.dumps(chat("one", "a")).encode(), b"", b"  \r", b"nonsense"]
    lines += [json.dumps(chat("two", "b")).encode() + b"\r", json.dumps(chat("三", "c")).encode()]
    path = written(tmp_path / "in.jsonl", *lines)
    path.write_bytes(path.read_bytes()[:-1])  # the last line need not end

    with Source(path, LIMITS) as source:
        assert [*source.numbers] == [1, 4, 5, 6]
        assert (len(source), source.last) == (4, 6)
        found = [*source.lines([3, 0, 2])]

    assert [line.number for line in found] == [6, 1, 5]
    assert [name_of(line.data or b"", line.number, LIMITS) for line in found] == ["c", "a", "b"]


def test_a_line_that_is_too_long_is_kept_out_of_memory_and_told(tmp_path: Path) -> None:
    limits = Limits(body_bytes=2000)
    path = written(tmp_path / "in.jsonl", chat("x" * 50_000, "a"), chat("Hi", "b"))

    with Source(path, limits) as source:
        long, short = source.lines([0, 1])
    told = [*answer_lines(ScriptedEngine(), replace(RULES, limits=limits), [long, short])]

    assert long.data is None
    assert json.loads(told[0].record)["error"]["code"] == "body_too_large"
    assert told[1].status == 200


def test_names_that_are_there_twice_are_refused_with_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl", chat("1", "a"), "", chat("2", "b"), chat("3", "a"), chat("4", "b"))

    with pytest.raises(RequestError) as refusal:
        Source(path, LIMITS)

    assert "'a' on the lines 1 and 4" in str(refusal.value)
    assert "'b' on the lines 3 and 5" in str(refusal.value)


def test_a_given_name_that_equals_the_number_of_another_line_is_there_twice(tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl", chat("1", "line-2"), chat("2"))

    with pytest.raises(RequestError, match="the lines 1 and 2"):
        Source(path, LIMITS)


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "no request"), (b"\n \n", "no request"), (b"a,b\n1,2\n", "none of the 2")]
)
def test_a_file_without_requests_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)

    with pytest.raises(RequestError, match=word):
        Source(path, LIMITS)


def test_what_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(RequestError, match="no regular file"):
        Source(tmp_path / "pipe", LIMITS)
    with pytest.raises(RequestError, match="does not exist"):
        Source(tmp_path / "nothing", LIMITS)


def test_a_file_that_changes_while_it_is_answered_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl", chat("1", "a"), chat("2", "b"))

    with Source(path, LIMITS) as source:
        written(path, chat("other", "a"), chat("2", "b"))
        with pytest.raises(RequestError, match="was changed"):
            source.read(*source.offset(1))


# --- answers


def test_an_answer_is_what_the_server_would_send() -> None:
    engine = ScriptedEngine()

    (record,) = answers_of(engine, chat("Hello", "mine", n=2))

    assert (record["id"], record["custom_id"], record["error"]) == ("batch_req_0000000001", "mine", None)
    response = record["response"]
    assert response["status_code"] == 200 and response["request_id"].startswith("req-")
    body = response["body"]
    assert body["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in body["choices"]] == ["Hello", "Hello"]
    assert body["usage"]["completion_tokens"] == 10
    assert body["model"] == "pocket"


def test_texts_are_continued_and_thoughts_told_apart() -> None:
    engine = ScriptedEngine()
    engine.script = ["<think>why</think>", "<answer>do()"]

    apart, plain = answers_of(engine, chat("x", return_reasoning=True), {"prompt": "x"})

    message = apart["response"]["body"]["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("why", "do()")
    assert plain["response"]["body"]["object"] == "text_completion"
    assert plain["response"]["body"]["choices"][0]["text"] == "<think>why</think><answer>do()"


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"stream": True}, 400, "invalid_value"),
        ({"model": "gpt"}, 404, "model_not_found"),
        ({"tools": [1]}, 400, "unsupported_parameter"),
        ({"nonsense": 1}, 400, "unknown_parameter"),
        ({"max_tokens": 5000}, 400, "context_length_exceeded"),
        ({"messages": "x"}, 400, "invalid_type"),
        ({"messages": None}, 400, "missing_field"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}
                ]
            },
            400,
            "invalid_image",
        ),
    ],
)
def test_a_field_is_refused_as_by_the_server_and_the_next_line_is_answered(
    fields: dict[str, Any], status: int, code: str
) -> None:
    refused, fine = answers_of(ScriptedEngine(), chat("x", "a", **fields), chat("y", "b"))

    assert (refused["custom_id"], refused["error"]) == ("a", None)
    assert refused["response"]["status_code"] == status
    assert refused["response"]["body"]["error"]["code"] == code
    assert fine["response"]["status_code"] == 200


def test_a_line_that_is_no_request_has_an_error_and_no_response() -> None:
    bad, fine = answers_of(ScriptedEngine(), b"nonsense", chat("y", "b"))

    assert (bad["custom_id"], bad["response"]) == (None, None)
    assert bad["error"]["code"] == "invalid_json" and bad["error"]["line"] == 1
    assert fine["response"]["status_code"] == 200


def test_all_slots_are_busy_as_long_as_there_are_requests() -> None:
    engine = ScriptedEngine()
    engine.concurrency = 3
    most = 0

    def lines() -> Iterator[Line]:
        for number, text in enumerate(("a" * 9, "b", "c" * 4, "d" * 2, "e"), 1):
            yield Line(number, json.dumps(chat(text, n=1)).encode())

    numbers = []
    for item in answer_lines(engine, RULES, lines()):
        numbers.append(item.number)
        most = max(most, len(engine.begun) - len(engine.ended))

    assert sorted(numbers) == [1, 2, 3, 4, 5]
    assert numbers[-1] == 1, "the longest answer ends last, and the others did not wait for it"
    assert most >= 2


def test_one_request_that_breaks_the_engine_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    class Breaking(ScriptedEngine):
        def _pieces(self, said: str, *rest: Any) -> Iterator[Any]:
            if said == "bad":
                raise ValueError(" ".join(("secret", "text")))
            return super()._pieces(said, *rest)

    engine = Breaking()
    engine.concurrency = 2
    found = answers_of(engine, chat("bad", "a", n=3), chat("good", "b"))

    statuses = {record["custom_id"]: record["response"]["status_code"] for record in found}
    assert statuses == {"a": 500, "b": 200}
    assert "secret text" not in json.dumps(found) + caplog.text


def test_results_come_in_order_and_no_more_is_taken_than_is_allowed_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(10):
            taken.append(item)
            yield item

    results = ahead(lambda item: -item, items(), 2)
    first = next(results)

    assert first == 0 and len(taken) <= 3
    assert [first, *results] == [-item for item in range(10)]
    with pytest.raises(ZeroDivisionError):
        [*ahead(lambda item: 1 // item, [0, 1], 5)]


# --- pictures by file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    (tmp_path / "pictures" / "deep" / "a.png").write_bytes(png(Image.new("RGB", (8, 8))))
    (tmp_path / "secret.png").write_bytes(png(Image.new("RGB", (8, 8))))
    (tmp_path / "pictures" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "pictures" / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pictures" / "pipe")
    return tmp_path / "pictures"


def pictured(source: Any, kind: str = "image_url") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": [{"type": kind, kind: source}, {"type": "text", "text": "x"}]}
        ]
    }


def test_a_picture_in_the_folder_is_read_and_the_body_left_as_it_is(folder: Path) -> None:
    body = pictured({"url": "deep/a.png", "detail": "high"})

    read_body = with_pictures(body, folder, LIMITS)

    part = read_body["messages"][0]["content"][0]["image_url"]
    assert part["url"].startswith("data:;base64,") and part["detail"] == "high"
    assert body == pictured({"url": "deep/a.png", "detail": "high"})
    inside = with_pictures(pictured(str(folder / "deep" / "a.png"), "image"), folder, LIMITS)
    assert inside["messages"][0]["content"][0]["image"].startswith("data:;base64,")


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "link.png",
        "circle",
        "deep",
        "pipe",
        "missing.png",
        "/etc/passwd",
        "",
        "a\x00b",
        "file:///etc/passwd",
        "x" * 5000,
    ],
)
def test_nothing_outside_of_the_folder_and_nothing_but_a_file_is_read(folder: Path, path: str) -> None:
    with pytest.raises(ApiError) as refusal:
        with_pictures(pictured({"url": path}), folder, LIMITS)

    assert refusal.value.code == "invalid_image"


def test_pictures_are_counted_and_measured_before_they_are_read(folder: Path) -> None:
    with pytest.raises(ApiError, match="more than 10 bytes"):
        with_pictures(pictured("deep/a.png", "image"), folder, Limits(image_bytes=10))
    body = pictured("deep/a.png", "image")
    body["messages"] *= 3
    with pytest.raises(ApiError, match="more than 2 pictures"):
        with_pictures(body, folder, Limits(images=2))


@pytest.mark.parametrize("body", [{}, {"messages": 1}, {"messages": [1, {"content": "x"}, {"content": [2]}]}])
def test_a_body_of_another_shape_is_left_to_the_servers_judgement(folder: Path, body: dict[str, Any]) -> None:
    assert with_pictures(body, folder, LIMITS) == body


def test_data_uris_are_untouched_and_files_answered(folder: Path) -> None:
    uri = data_uri(png(Image.new("RGB", (8, 8))))
    rules = replace(RULES, images_from=folder)
    line = {"url": "/v1/chat/completions", "body": pictured({"url": "deep/a.png"})}

    assert with_pictures(pictured(uri, "image"), folder, LIMITS) == pictured(uri, "image")
    (record,) = answers_of(ScriptedEngine(), line, rules=rules)
    assert record["response"]["status_code"] == 200
    (refused,) = answers_of(ScriptedEngine(), line)
    assert refused["response"]["body"]["error"]["code"] == "invalid_image"


# --- the output file


def record(number: int, text: str = "x") -> bytes:
    return json.dumps({"id": id_of(number), "text": text}, separators=(",", ":")).encode()


def test_what_was_written_is_found_again_and_nothing_is_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Output(path, ABOUT, 9) as output:
        assert output.append(7, record(7)) and output.append(2, record(2))
        assert not output.append(7, record(7, "again"))

    with Output(path, ABOUT, 9) as output:
        assert (len(output), 7 in output, 3 in output, 99 in output) == (2, True, False, False)
        output.append(3, record(3))
        output.sort(iter([2, 3, 7]))

    assert path.read_bytes() == record(2) + b"\n" + record(3) + b"\n" + record(7) + b"\n"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.state"]


@given(cut=st.integers(0, 400), junk=st.binary(max_size=30).filter(lambda data: b"\n" not in data))
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_repaired_to_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes
) -> None:
    path = tmp_path_factory.mktemp("torn") / "out.jsonl"
    with Output(path, ABOUT, 9) as output:
        for number in range(1, 10):
            output.append(number, record(number))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + junk)

    with Output(path, ABOUT, 9) as output:
        kept = whole[:cut].count(b"\n")
        assert len(output) == kept
        assert output.repaired == len((whole[:cut] + junk).rpartition(b"\n")[2])
        for number in range(1, 10):
            output.append(number, record(number))

    assert path.read_bytes() == whole


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    with (
        Output(tmp_path / "out.jsonl", ABOUT, 3),
        pytest.raises(RequestError, match="another run"),
    ):
        Output(tmp_path / "out.jsonl", ABOUT, 3)
    Output(tmp_path / "out.jsonl", ABOUT, 3).close()


def test_a_file_that_was_begun_from_something_else_is_refused_by_what_differs(tmp_path: Path) -> None:
    with Output(tmp_path / "out.jsonl", ABOUT, 3) as output:
        output.append(1, record(1))

    with pytest.raises(RequestError, match="context null, now 512"):
        Output(tmp_path / "out.jsonl", ABOUT | {"context": 512}, 3)
    with pytest.raises(RequestError, match="input_sha256"):
        Output(tmp_path / "out.jsonl", ABOUT | {"input_sha256": "1"}, 3)


def test_a_file_without_an_answer_may_be_begun_anew(tmp_path: Path) -> None:
    Output(tmp_path / "out.jsonl", ABOUT, 3).close()

    Output(tmp_path / "out.jsonl", ABOUT | {"context": 512}, 3).close()


@pytest.mark.parametrize(
    "line", [b"hello\n", b"\x00\x00\n", b'{"id":"batch_req_0000000009"}\n', b'{"id":"batch_req_0000000001"\n']
)
def test_a_foreign_line_in_the_file_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "out.jsonl"
    with Output(path, ABOUT, 3) as output:
        output.append(2, record(2))
    path.write_bytes(path.read_bytes() + line)

    with pytest.raises(RequestError, match="line 2 of"):
        Output(path, ABOUT, 3)


def test_a_line_that_stands_twice_and_a_damaged_state_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Output(path, ABOUT, 3) as output:
        output.append(2, record(2))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(RequestError, match="line 2 twice"):
        Output(path, ABOUT, 3)

    for state in ("", "[]", '{"autoglm_batch": 9, "about": {}}', '{"autoglm_batch": 1}'):
        (tmp_path / "out.jsonl.state").write_text(state)
        with pytest.raises(RequestError, match="damaged"):
            Output(path, ABOUT, 3)


def test_a_file_of_somebody_else_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")

    with pytest.raises(RequestError, match="name another output file"):
        Output(path, ABOUT, 3)
    with pytest.raises(RequestError, match="cannot be written"):
        Output(tmp_path, ABOUT, 3)

    assert path.read_text() == "precious\n"


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    write = os.write

    def full(handle: int, data: Any) -> int:
        if len(data) < 30:
            raise OSError(28, "No space left on device")
        return write(handle, bytes(data[:20]))

    with Output(path, ABOUT, 3) as output:
        output.append(1, record(1))
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space"):
                output.append(2, record(2, "long enough to be written in pieces"))
        assert 2 not in output
        assert path.read_bytes() == record(1) + b"\n"
        output.append(2, record(2))

    assert path.read_bytes() == record(1) + b"\n" + record(2) + b"\n"


# --- a run


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(pocket_path(), "int8")


def answered_by(engine: ScriptedEngine, rules: Rules = RULES) -> Any:
    def work(source: Source, missing: Sequence[int]) -> Generator[Answered, None, None]:
        yield from answer_lines(engine, rules, source.lines(missing))

    return work


def test_a_run_that_was_ended_goes_on_with_exactly_what_is_missing(bundle: Path, tmp_path: Path) -> None:
    asked = written(tmp_path / "in.jsonl", *(chat(f"text {item}", f"r{item}") for item in range(6)))
    out = tmp_path / "out.jsonl"
    first, second = ScriptedEngine(), ScriptedEngine()

    def broken(source: Source, missing: Sequence[int]) -> Generator[Answered, None, None]:
        for count, item in enumerate(answer_lines(first, RULES, source.lines(missing))):
            if count == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        answer_file(asked, out, Opening(bundle), RULES, broken, Told())
    assert len(read(out)) == 3
    told = Told()
    summary = answer_file(asked, out, Opening(bundle), RULES, answered_by(second), told)

    assert told.start == (6, 3, 0)
    assert second.begun == ["text 3", "text 4", "text 5"]
    assert summary == Summary(6, 3, 3, 0, summary.tokens, summary.seconds)
    assert [line["custom_id"] for line in read(out)] == [f"r{item}" for item in range(6)]

    def never(source: Source, missing: Sequence[int]) -> Generator[Answered, None, None]:
        raise AssertionError("nothing is missing")
        yield

    assert answer_file(asked, out, Opening(bundle), RULES, never, Told()).answered == 0


def test_answers_are_put_into_order_when_all_are_there(bundle: Path, tmp_path: Path) -> None:
    asked = written(tmp_path / "in.jsonl", *(chat("x" * (9 - item), f"r{item}") for item in range(4)))

    def backwards(source: Source, missing: Sequence[int]) -> Generator[Answered, None, None]:
        yield from answer_lines(ScriptedEngine(), RULES, source.lines([*missing][::-1]))

    for name, ordered in (("a", False), ("b", True)):
        answer_file(asked, tmp_path / name, Opening(bundle), RULES, backwards, Told(), ordered=ordered)

    names = ["r0", "r1", "r2", "r3"]
    assert [line["custom_id"] for line in read(tmp_path / "a")] == names[::-1]
    assert [line["custom_id"] for line in read(tmp_path / "b")] == names


def test_what_a_worker_leaves_out_or_says_twice_is_mended(bundle: Path, tmp_path: Path) -> None:
    asked = written(tmp_path / "in.jsonl", *(chat("x", f"r{item}") for item in range(5)))
    rounds: list[list[int]] = []

    def careless(source: Source, missing: Sequence[int]) -> Generator[Answered, None, None]:
        rounds.append([*missing])
        some = [*missing][: 1 + len(missing) // 2]
        yield from answer_lines(ScriptedEngine(), RULES, source.lines(some + some))

    summary = answer_file(asked, tmp_path / "out", Opening(bundle), RULES, careless, Told())

    assert rounds == [[0, 1, 2, 3, 4], [3, 4]]
    assert summary.answered == 5
    assert sorted(line["custom_id"] for line in read(tmp_path / "out")) == [f"r{item}" for item in range(5)]


def test_a_worker_that_answers_nothing_ends_the_run(bundle: Path, tmp_path: Path) -> None:
    asked = written(tmp_path / "in.jsonl", chat("x"))

    def lazy(source: Source, missing: Sequence[int]) -> Generator[Answered, None, None]:
        yield from ()

    with pytest.raises(EdgeError, match="got no answer"):
        answer_file(asked, tmp_path / "out", Opening(bundle), RULES, lazy, Told())


def test_an_engine_that_fails_at_everything_ends_the_run_and_spoils_no_line(
    bundle: Path, tmp_path: Path
) -> None:
    asked = written(tmp_path / "in.jsonl", *(chat("x", f"r{item}") for item in range(20)))
    broken = ScriptedEngine()
    broken.error = ValueError("the device is gone")

    with pytest.raises(EdgeError, match="5 requests in a row"):
        answer_file(asked, tmp_path / "out", Opening(bundle), RULES, answered_by(broken), Told())
    assert MOST_FAULTS == 5
    assert read(tmp_path / "out") == []
    summary = answer_file(
        asked, tmp_path / "out", Opening(bundle), RULES, answered_by(ScriptedEngine()), Told()
    )

    assert (summary.answered, summary.refused) == (20, 0)


def test_the_input_is_never_the_output(bundle: Path, tmp_path: Path) -> None:
    asked = written(tmp_path / "in.jsonl", chat("x"))
    (tmp_path / "link").symlink_to(asked)

    with pytest.raises(RequestError, match="is the input, too"):
        answer_file(asked, tmp_path / "link", Opening(bundle), RULES, answered_by(ScriptedEngine()), Told())


# --- the command


def refused(*arguments: Any) -> str:
    result = CliRunner().invoke(run, [*map(str, arguments)])
    assert result.exit_code in (1, 2), result.output
    return result.stderr


def test_options_that_contradict_each_other_are_refused(bundle: Path, tmp_path: Path) -> None:
    asked = written(tmp_path / "in.jsonl", chat("x"))
    out = tmp_path / "out"

    assert "-o" in refused(bundle, "--batch", asked)
    assert "--batch" in refused(bundle, "Hi", "-o", out)
    assert "--batch" in refused(bundle, "Hi", "--ray")
    assert "--ray" in refused(bundle, "--batch", asked, "-o", out, "--workers", 2)
    assert "--temperature" in refused(bundle, "--batch", asked, "-o", out, "--temperature", 0)
    assert "TEXT" in refused(bundle, "Hi", "--batch", asked, "-o", out)
    assert "no folder" in refused(bundle, "--batch", asked, "-o", out, "--images-from", tmp_path / "nothing")
    assert not out.exists()


def test_the_command_answers_as_the_engine_does_and_a_second_one_has_nothing_to_do(
    bundle: Path, tmp_path: Path
) -> None:
    asked = written(
        tmp_path / "in.jsonl", chat("打开设置", "a", max_tokens=6), "nonsense", chat("Hi", "c", max_tokens=4)
    )
    arguments = [
        bundle,
        "--batch",
        asked,
        "-o",
        tmp_path / "out",
        "--threads",
        1,
        "--max-concurrency",
        1,
        "--json",
    ]

    first = CliRunner().invoke(run, [*map(str, arguments)])
    again = CliRunner().invoke(run, [*map(str, arguments)])

    assert (first.exit_code, again.exit_code) == (0, 0), first.output
    assert json.loads(first.stdout.splitlines()[-1])["answered"] == 3
    assert json.loads(again.stdout.splitlines()[-1])["before"] == 3
    assert "1 of them with an error" in first.stderr
    found = {line["custom_id"]: line for line in read(tmp_path / "out")}
    with Opening(bundle).open(ServedEngine) as engine:
        deltas = [*engine.chat([{"role": "user", "content": "打开设置"}], max_tokens=6)]
    said = found["a"]["response"]["body"]["choices"][0]["message"]["content"]
    assert said == "".join(delta.text for delta in deltas)
    assert found[None]["error"]["line"] == 2


def test_a_run_that_is_killed_is_continued_without_gap_or_double(bundle: Path, tmp_path: Path) -> None:
    eos = json.loads((pocket_path() / "config.json").read_text())["eos_token_id"]
    endless = {"logit_bias": {str(token): -100 for token in eos}}
    lines = [chat(f"text {item}", f"r{item}", max_tokens=24, **endless) for item in range(40)]
    asked, out = written(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    code = "from autoglm_edge.commands.run import run; run.main(prog_name='autoglm run')"
    command = [
        sys.executable,
        "-c",
        code,
        str(bundle),
        "--batch",
        str(asked),
        "-o",
        str(out),
        "--threads",
        "1",
    ]

    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = out.read_bytes().rpartition(b"\n")[0]
    assert kept.count(b"\n") + 1 < 40
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "going on" in done.stderr
    assert out.read_bytes().startswith(kept)
    assert sorted(line["custom_id"] for line in read(out)) == sorted(f"r{item}" for item in range(40))
    assert {line["response"]["body"]["usage"]["completion_tokens"] for line in read(out)} == {24}


def test_progress_tells_rate_and_time_left() -> None:
    now = [0.0]
    progress = BatchProgress(lambda: now[0])
    progress.began(100, 20, 0)
    now[0] = 4.0
    for number in range(8):
        progress.answered(Answered(number, b"", 200 if number else 400, 10))

    assert progress.state == "28 of 100 requests"
    assert progress.text(4.0) == "28 of 100 requests, 1 with an error, 20.0 tokens/s, 0:00:36 left"
