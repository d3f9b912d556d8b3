"""response_format over real HTTP: what ends with "stop" is JSON of its schema, for every client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import CliRunner
from pydantic import BaseModel, Field
from server_fixtures import CHAT, Live, events_of, running, text_of

from autoglm_edge.commands.run import run
from autoglm_edge.embedded import pocket_path
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.reuse.options import ReuseOptions
from autoglm_edge.runtime.session import SessionOptions
from autoglm_edge.server.work.answering import ServedEngine

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")

MODEL = "autoglm-phone-9b"
ASK = [{"role": "user", "content": "打开设置"}]


class Action(BaseModel):
    """An operation on the screen."""

    kind: Literal["Tap", "Swipe"]
    x: int = Field(ge=0, le=999)
    y: int = Field(ge=0, le=999)
    sure: bool | None


SCHEMA = {**Action.model_json_schema(), "additionalProperties": False}


def held_to(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "action", "schema": schema, **more}}


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(pocket_path(), "int8")


@pytest.fixture(scope="module")
def live(bundle: Path) -> Iterator[Live]:
    def load() -> ServedEngine:
        return ServedEngine(Bundle.open(bundle), options=SessionOptions(threads=1), context=2000)

    with running(load) as live:
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


def refusal(response: Any) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


# --- clients


def test_openai_gets_json_of_a_schema_whole_and_streamed(client: Any) -> None:
    asked = {
        "model": MODEL,
        "messages": ASK,
        "response_format": held_to(SCHEMA, strict=True),
        "max_tokens": 80,
    }

    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))

    content = whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    assert Action.model_validate_json(content)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == content


def test_openai_parses_answers_into_its_callers_classes(client: Any) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Action, max_tokens=80, temperature=0.9, seed=4
    )

    assert isinstance(parsed.choices[0].message.parsed, Action)


def test_langchain_gives_structured_output(live: Live) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    brace = live.post("/tokenize", {"prompt": "}"}).json()["tokens"][0]
    options = {"model": MODEL, "base_url": f"{live.url}/v1", "api_key": "EMPTY", "temperature": 0}
    model = langchain_openai.ChatOpenAI(**options, max_tokens=120, max_retries=0)
    hasty = langchain_openai.ChatOpenAI(**options, max_tokens=120, max_retries=0, logit_bias={brace: 100})

    action = model.with_structured_output(Action, method="json_schema").invoke([("user", "打开设置")])
    anything = hasty.with_structured_output(None, method="json_mode").invoke([("user", "JSON: 打开设置")])

    assert isinstance(action, Action)
    assert anything == {}


# --- what is honoured


def test_any_object_is_an_object_and_text_is_text(live: Live) -> None:
    free = live.chat("打开设置", max_tokens=24)
    text = live.chat("打开设置", max_tokens=24, response_format={"type": "text"})
    held = live.chat(
        "打开设置", max_tokens=200, temperature=0.9, seed=1, response_format={"type": "json_object"}
    )

    assert text.json()["choices"] == free.json()["choices"]
    choice = held.json()["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_several_answers_and_completions_are_held_as_well(live: Live) -> None:
    body = {"n": 3, "temperature": 1, "seed": 7, "response_format": held_to(SCHEMA), "max_tokens": 80}
    chat = live.chat("x", **body).json()["choices"]
    texts = live.post("/v1/completions", {"prompt": ["Hi", "Ho"], **body}).json()["choices"]
    plain = live.post("/generate", {"text": "Hi", **body, "n": 1}).json()

    found = [choice["message"]["content"] for choice in chat] + [choice["text"] for choice in texts]
    found.append(plain["text"])
    assert len(found) == 10
    for text in found:
        Action.model_validate_json(text)
    assert len(set(found)) > 1


def test_many_requests_at_once_each_get_their_own_schema(live: Live) -> None:
    def ask(number: int) -> Any:
        held = held_to({"const": {"number": number}})
        return live.chat("x" * number, max_tokens=40, response_format=held, stream=number % 2 == 0)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(1, 9)))

    for number, answer in enumerate(answers, 1):
        text = (
            text_of(events_of(answer))
            if number % 2 == 0
            else answer.json()["choices"][0]["message"]["content"]
        )
        assert json.loads(text) == {"number": number}


def test_too_few_tokens_end_in_the_middle_with_length(live: Live) -> None:
    choice = live.chat("x", max_tokens=3, response_format=held_to(SCHEMA)).json()["choices"][0]

    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("{")


def test_a_stop_string_ends_a_document_like_any_text(live: Live) -> None:
    held = held_to({"const": {"a": "one two three"}})
    choice = live.chat("x", max_tokens=40, stop=["two"], response_format=held).json()["choices"][0]

    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"].endswith("one ")


def test_a_closing_tag_within_a_string_ends_nothing(live: Live) -> None:
    choice = live.post(
        CHAT,
        {"messages": ASK, "response_format": held_to({"const": "a</answer>b"}), "max_tokens": 60},
    ).json()["choices"][0]

    assert json.loads(choice["message"]["content"]) == "a</answer>b"
    assert choice["finish_reason"] == "stop"


def test_a_thought_may_come_first_and_none_comes_where_it_is_switched_off(live: Live) -> None:
    body = {"max_tokens": 200, "response_format": held_to(SCHEMA), "return_reasoning": True}
    with_thought = live.chat("打开设置", enable_thinking=True, **body).json()["choices"][0]
    without = live.chat("打开设置", enable_thinking=False, **body).json()["choices"][0]
    unsaid = live.chat("打开设置", **body).json()["choices"][0]
    plain = live.chat("打开设置", **(body | {"return_reasoning": False}), enable_thinking=True).json()[
        "choices"
    ][0]

    assert with_thought["finish_reason"] == without["finish_reason"] == unsaid["finish_reason"] == "stop"
    assert with_thought["message"]["reasoning_content"], "this model thinks"
    for choice in (with_thought, without, unsaid):
        Action.model_validate_json(choice["message"]["content"])
    assert not without["message"].get("reasoning_content")
    assert not unsaid["message"].get("reasoning_content")
    assert plain["message"]["content"].startswith("<think>")
    assert Action.model_validate_json(plain["message"]["content"].partition("</think>")[2])


# --- what is refused


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"type": "xml"}, "response_format.type is 'xml', must be one of text, json_object, json_schema"),
        ({}, "response_format.type is None"),
        ({"type": "json_schema"}, "json_schema is missing"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "schema is missing"),
        ({"type": "json_schema", "json_schema": {"name": "x y", "schema": {}}}, "name is 'x y'"),
        ({"type": "json_object", "json_schema": {"schema": {}}}, "cannot go with the type 'json_object'"),
        (held_to([1]), "schema is a list, must be an object"),
        (held_to({"not": {}}), 'Unimplemented keys: ["not"]'),
        (held_to({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (held_to({"$ref": "https://example.org/x"}), "not present in a registry"),
        (held_to({"$ref": "#"}), "no JSON at all fits it"),
        (held_to({"enum": ["x" * 9000]}), "string of 9000 characters"),
        (held_to({"properties": {f"p{i}": {} for i in range(1001)}}), "1001 members"),
        (held_to({"enum": [["y" * 7000]] * 10}), "bytes, at most 64000 are taken"),
    ],
)
def test_a_format_that_cannot_be_is_refused_by_name(live: Live, held: Any, said: str) -> None:
    error = refusal(live.chat(response_format=held))

    assert said in error["message"]
    assert error["param"] == "response_format"


def test_an_unknown_field_of_a_format_is_refused(live: Live) -> None:
    assert refusal(live.chat(response_format={"type": "text", "schema": {}}))["param"] == "schema"
    assert refusal(live.chat(response_format=held_to({}, lenient=True)))["param"] == "lenient"


def test_a_schema_that_gets_too_costly_ends_one_answer_and_not_the_server(live: Live) -> None:
    costly = held_to({"type": "string", "pattern": "^(\\w{1,1000}){1,1000}$", "minLength": 900})
    body = {"messages": ASK, "max_tokens": 400, "temperature": 1.5, "response_format": costly, "seed": 2}

    answer = live.post(CHAT, body)

    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert "could not be held to its JSON schema" in answer.json()["error"]["message"]
    assert live.chat("Hi", max_tokens=2).status_code == 200


# --- the engine itself


def test_drafts_change_nothing_in_a_held_answer(bundle: Path) -> None:
    schema = {"type": "array", "items": SCHEMA, "minItems": 3, "maxItems": 4}

    def answer(lookup: Literal[True, False], **sampling: Any) -> str:
        reuse = ReuseOptions(lookup=lookup, prefix=False)
        with Engine.load(bundle, threads=1, reuse=reuse, context=1000) as engine:
            grammar = engine.grammar(schema)
            return "".join(
                delta.text for delta in engine.chat(ASK, max_tokens=300, grammar=grammar, **sampling)
            )

    for sampling in ({}, {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.2}):
        drafted = answer(True, **sampling)
        assert drafted == answer(False, **sampling)
        assert all(Action.model_validate(item) for item in json.loads(drafted))


# --- the command line


def test_the_command_line_holds_an_answer_to_a_file(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"const": {"名": [1, 2]}}), encoding="utf-8")

    result = CliRunner().invoke(run, [str(bundle), "Hi", "--json-schema", str(file), "--threads", "1"])

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"名": [1, 2]}


def test_the_command_line_refuses_what_is_no_schema(bundle: Path, tmp_path: Path) -> None:
    def said(text: str, *more: str) -> str:
        file = tmp_path / "schema.json"
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        result = CliRunner().invoke(run, [str(bundle), "Hi", "--json-schema", str(file), *more])
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "says more than --json-object" in said("{}", "--json-object")
    assert "is not JSON in UTF-8" in said("{")
    assert "is not JSON in UTF-8" in said("\udcff")
    assert "is not JSON in UTF-8" in said("[" * 100_000)
    assert "of type list" in said("[]")
    assert "no JSON at all fits it" in said("false")


def test_a_schema_that_cannot_be_held_to_ends_the_command_with_one_sentence(
    bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"not": {}}', encoding="utf-8")

    result = CliRunner().invoke(run, [str(bundle), "Hi", "--json-schema", str(file), "--threads", "1"])

    assert result.exit_code == 1
    assert 'Unimplemented keys: ["not"]' in result.stderr
