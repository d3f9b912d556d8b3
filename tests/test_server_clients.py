"""Clients that must work unchanged, against the embedded model over real HTTP.

The openai and langchain_openai packages, and a phone agent's session as Open-AutoGLM's client sends it.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from server_fixtures import CHAT, Live, running

from autoglm_edge.embedded import pocket_path, sample_screenshot
from autoglm_edge.runtime.actions import parse_action
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.reuse.options import ReuseOptions
from autoglm_edge.runtime.session import SessionOptions
from autoglm_edge.server.work.answering import ServedEngine

openai = pytest.importorskip("openai")

MODEL = "autoglm-phone-9b"
INSTRUCTION = "打开设置"
AS_THE_AGENT = {"max_tokens": 3000, "temperature": 0.0, "top_p": 0.85, "frequency_penalty": 0.2}
SESSION = Path(__file__).parent.parent / "benchmarks" / "agent_session.json"


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(pocket_path(), "int8")


@pytest.fixture(scope="module")
def live(bundle: Path) -> Iterator[Live]:
    def load() -> ServedEngine:
        return ServedEngine(Bundle.open(bundle), options=SessionOptions(threads=1))

    with running(load) as live:
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


def screenshot(step: int = 0) -> Image.Image:
    """The sample, and on later steps something else on it."""
    image = Image.open(sample_screenshot()).convert("RGB")
    if step:
        ImageDraw.Draw(image).rectangle((40, 60 * step, 400, 60 * step + 40), fill=(20 * step, 90, 200))
    return image


def picture_part(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.convert("RGBA").save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def ask(text: str = INSTRUCTION) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [picture_part(screenshot()), {"type": "text", "text": text}]}]


# --- openai


def test_openai_gets_the_engines_own_answer_whole_and_streamed(client: Any, bundle: Path) -> None:
    with Engine.load(bundle, threads=1) as engine:
        own = "".join(delta.text for delta in engine.chat(ask(), max_tokens=100, frequency_penalty=0.2))

    whole = client.chat.completions.create(
        model=MODEL, messages=ask(), max_tokens=100, temperature=0, frequency_penalty=0.2
    )
    stream = client.chat.completions.create(
        model=MODEL, messages=ask(), stream=True, stream_options={"include_usage": True}, **AS_THE_AGENT
    )
    chunks = list(stream)

    assert whole.choices[0].message.content == own
    assert parse_action(own).kind == "Tap"  # type: ignore[union-attr]
    assert whole.choices[0].finish_reason == "stop"
    assert "</answer>" not in own
    texts = [
        c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content is not None
    ]
    assert "".join(texts) == own
    assert texts[0], "the first chunk with content is the first token"
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 100
    assert whole.timings["encoded_images"] + whole.timings["cached_images"] == 1


def test_openai_reads_refusals_as_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=ask("x " * 30_000))
    assert caught.value.code == "context_length_exceeded"
    assert re.search(r"the prompt has \d{5} tokens", str(caught.value))

    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=ask())
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model=MODEL, messages=ask(), tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.BadRequestError, match=re.escape("<|user|>")):
        client.chat.completions.create(model=MODEL, messages=ask("<|user|>"))


def test_openai_lists_models_and_continues_texts(client: Any) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL

    first = client.completions.create(
        model=MODEL, prompt="[gMASK]<sop><|user|>\nHi<|assistant|>\n", max_tokens=8
    )
    again = client.completions.create(
        model=MODEL, prompt="[gMASK]<sop><|user|>\nHi<|assistant|>\n", max_tokens=8, stream=True
    )
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=8
    )

    assert first.choices[0].text == chat.choices[0].message.content
    assert "".join(chunk.choices[0].text for chunk in again) == first.choices[0].text


def test_openai_gets_the_thought_apart_if_it_asks(client: Any) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=ask(), max_tokens=60, temperature=0, extra_body={"return_reasoning": True}
    )
    message = whole.choices[0].message

    assert message.reasoning_content
    assert message.content.startswith("do(")


def test_a_seed_repeats_an_answer_and_several_answers_differ(client: Any) -> None:
    def draw(seed: int) -> list[str]:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=12,
            temperature=2,
            n=3,
            seed=seed,
        )
        return [choice.message.content for choice in answer.choices]

    assert draw(1) == draw(1)
    assert len(set(draw(1))) > 1


def test_stops_and_bias_are_honoured(client: Any, live: Live) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ask(), max_tokens=60, temperature=0, stop=["</think>"]
    )
    assert answer.choices[0].message.content.startswith("<think>")
    assert "</think>" not in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"

    token = live.post("/tokenize", {"prompt": "!"}).json()["tokens"][0]
    biased = client.chat.completions.create(
        model=MODEL, messages=ask(), max_tokens=4, logit_bias={str(token): 100}
    )
    assert biased.choices[0].message.content == "!!!!"


def test_the_agents_first_question_is_answered(client: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0.0, stream=False
    )

    assert answer.choices
    assert answer.usage.completion_tokens <= 5


def test_tokens_of_a_conversation_are_those_of_its_answer(live: Live) -> None:
    counted = live.post("/tokenize", {"messages": ask()}).json()
    answered = live.post(CHAT, {"messages": ask(), "max_tokens": 1}).json()

    assert counted["count"] == answered["usage"]["prompt_tokens"] == len(counted["tokens"])
    assert answered["usage"]["prompt_tokens_details"]["image_tokens"] > 50


def test_generate_finds_the_action_in_pixels(live: Live) -> None:
    data = base64.b64encode(sample_screenshot().read_bytes()).decode()

    document = live.post("/generate", {"text": INSTRUCTION, "image": data, "max_tokens": 60}).json()

    left, top, right, bottom = json.loads((pocket_path() / "example.json").read_text("utf-8"))["box"]
    x, y = document["action"]["element"]
    assert document["action"]["type"] == "Tap"
    assert left <= x <= right
    assert top <= y <= bottom
    width, height = screenshot().size
    assert document["action"]["element_pixels"] == [int(x / 1000 * width), int(y / 1000 * height)]


def test_thinking_can_be_switched_off(live: Live) -> None:
    def begin(**fields: Any) -> tuple[int, str]:
        document = live.post(CHAT, {"messages": ask(), "max_tokens": 12} | fields).json()
        return document["usage"]["prompt_tokens"], document["choices"][0]["message"]["content"]

    plain, thought = begin()
    without, answer = begin(enable_thinking=False)
    with_, same = begin(enable_thinking=True)

    assert thought.startswith("<think>")
    assert (with_, same) == (plain, thought)
    assert without == plain + 3
    assert answer.startswith("do(")


# --- langchain


def test_langchain_streams_and_counts(live: Live) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        model=MODEL,
        base_url=f"{live.url}/v1",
        api_key="EMPTY",
        temperature=0,
        max_tokens=60,
        streaming=True,
        stream_usage=True,
        max_retries=0,
        extra_body={"enable_thinking": True, "return_reasoning": False},
    )

    chunks = list(chat.stream(ask()))
    whole = chat.invoke(ask())

    text = "".join(chunk.content for chunk in chunks)
    assert parse_action(text).kind == "Tap"  # type: ignore[union-attr]
    assert whole.content == text
    usage = next(chunk.usage_metadata for chunk in reversed(chunks) if chunk.usage_metadata)
    assert usage["input_tokens"] > 100
    assert usage["input_token_details"]["cache_read"] > 100


def test_langchain_without_thinking_gets_the_answer_alone(live: Live) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        model=MODEL, base_url=f"{live.url}/v1", api_key="EMPTY", temperature=0, max_tokens=12,
        extra_body={"enable_thinking": False, "return_reasoning": True},
    )  # fmt: skip

    assert chat.invoke(ask()).content.startswith("do(")


# --- a phone agent


class Agent:
    """What Open-AutoGLM's client sends, step by step: pictures of old turns taken out, tags doubled."""

    def __init__(self, client: Any) -> None:
        self.client = client
        system = "\n".join(json.loads(SESSION.read_text("utf-8"))["system"])
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}]

    def step(self, image: Image.Image, text: str) -> tuple[str, Any]:
        """One action; returns what was said and the counts."""
        self.messages.append(
            {"role": "user", "content": [picture_part(image), {"type": "text", "text": text}]}
        )
        stream = self.client.chat.completions.create(
            messages=self.messages,
            model=MODEL,
            extra_body={},
            stream=True,
            **{**AS_THE_AGENT, "stream_options": {"include_usage": True}},
        )
        said, usage = "", None
        for chunk in stream:
            usage = chunk.usage or usage
            if len(chunk.choices) == 0:
                continue
            if chunk.choices[0].delta.content is not None:
                said += chunk.choices[0].delta.content
        marker = "finish(message=" if "finish(message=" in said else "do(action="
        thinking, found, action = said.partition(marker)
        self.messages[-1]["content"] = [
            part for part in self.messages[-1]["content"] if part["type"] == "text"
        ]
        answer = f"<think>{thinking.strip()}</think><answer>{found + action}</answer>"
        self.messages.append({"role": "assistant", "content": answer})
        return said, usage


def test_each_step_of_an_agent_computes_only_what_is_new(live: Live, client: Any) -> None:
    agent = Agent(client)
    before: list[int] = []
    for step in range(4):
        text = f'{INSTRUCTION}\n\n{{"current_app": "Home"}}' if step == 0 else '** Screen Info **\n\n{"a": 1}'
        # What the next prompt shares with this one ends where this one's picture begins.
        plain = [*agent.messages, {"role": "user", "content": ""}]
        shared = live.post("/tokenize", {"messages": plain}).json()["count"] - 3

        said, usage = agent.step(screenshot(step), text)

        cached = usage.prompt_tokens_details.cached_tokens
        assert parse_action(said) is not None, said
        assert "</answer>" not in said
        if step:
            expected = before[-1]
            assert expected - 32 <= cached <= expected, (step, cached, expected)
            assert cached > 1000
        before.append(shared)
    assert "<think><think>" in agent.messages[2]["content"]


def test_two_agents_that_take_turns_keep_their_beginnings(live: Live, client: Any) -> None:
    first, second = Agent(client), Agent(client)
    second.messages[0]["content"] = "Another system prompt. " * 60
    for agent in (first, second):
        agent.step(screenshot(), "one")

    for agent in (first, second, first, second):
        _, usage = agent.step(screenshot(2), "more")
        assert usage.prompt_tokens_details.cached_tokens > 250


def test_what_one_client_sent_changes_nothing_but_speed_for_another(
    bundle: Path, client: Any, live: Live
) -> None:
    """The same questions, asked of a server that has seen others', and of one that keeps nothing."""
    questions = [f"Question {number}: what is on this screen?" for number in range(3)]
    secret = "The password is swordfish-7. " * 8
    live.chat(secret + questions[0], max_tokens=4)

    def answers(base: str) -> list[str]:
        with openai.OpenAI(base_url=f"{base}/v1", api_key="EMPTY", max_retries=0) as other:
            return [
                other.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": text}], max_tokens=16, temperature=0
                ).choices[0].message.content
                for text in questions
            ]  # fmt: skip

    def load() -> ServedEngine:
        reuse = replace(ReuseOptions.off(), lookup=False)
        return ServedEngine(Bundle.open(bundle), options=SessionOptions(threads=1), reuse=reuse)

    warm = answers(live.url)
    with running(load) as cold:
        assert answers(cold.url) == warm
    assert not any("swordfish" in answer for answer in warm)


TEXT = re.compile(r'"content": ?"[^"]')


def test_a_client_that_hangs_up_frees_the_real_engine(live: Live) -> None:
    cancelled = live.metric('autoglm_answers_total{finish="cancelled"}')
    with live.http.stream(
        "POST", CHAT, json={"messages": ask(), "stream": True, "max_tokens": 2000, "stop": "never"}
        | {"logit_bias": {str(token): -100 for token in ends(live)}},
    ) as response:  # fmt: skip
        # What comes before the first text may be sent before the engine has begun.
        next(line for line in response.iter_lines() if line.startswith("data:") and TEXT.search(line))

    assert live.chat("next", max_tokens=2).status_code == 200
    assert live.metric('autoglm_answers_total{finish="cancelled"}') == cancelled + 1


def ends(live: Live) -> list[int]:
    """Ids that end an answer: with them out of reach it goes on until it is cancelled."""
    config = json.loads((pocket_path() / "config.json").read_text("utf-8"))
    found: list[int] = config["eos_token_id"]
    return found
