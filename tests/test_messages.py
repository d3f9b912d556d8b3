from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front_fixtures import picture
from PIL import Image

from autoglm_edge.errors import ImageError, PromptError
from autoglm_edge.runtime.prompt.messages import ImagePart, Message, TextPart, read_messages


def png() -> bytes:
    buffer = io.BytesIO()
    picture(12, 8).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri() -> str:
    return "data:image/png;base64," + base64.b64encode(png()).decode()


def read_one(content: Any, role: str = "user") -> Message:
    return read_messages([{"role": role, "content": content}])[0]


def test_string_content_is_one_text_part() -> None:
    assert read_one("点击 OK", "system") == Message("system", (TextPart("点击 OK"),), is_string=True)


def test_a_list_keeps_the_order_of_its_parts() -> None:
    message = read_one(
        [
            {"type": "text", "text": "a"},
            {"type": "image", "image": picture(12, 8)},
            {"type": "text", "text": "b"},
        ]
    )
    assert [type(part) for part in message.parts] == [TextPart, ImagePart, TextPart]
    assert not message.is_string
    assert len(message.images) == 1


def test_every_way_to_give_an_image_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "shot.png"
    path.write_bytes(png())
    parts = [
        {"type": "image_url", "image_url": {"url": data_uri(), "detail": "high"}},
        {"type": "image_url", "image_url": data_uri()},
        {"type": "image_url", "image_url": {"url": str(path)}},
        {"type": "image_url", "image_url": {"url": path.as_uri()}},
        {"type": "image", "image": Image.open(io.BytesIO(png()))},
        {"type": "image", "image": png()},
        {"type": "image", "image": path},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": data_uri()},
    ]
    images = read_one(parts).images
    assert len(images) == len(parts)
    for image in images:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(12, 8)))


def test_an_assistant_without_content_said_nothing() -> None:
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        assert read_messages([message])[0].parts == (TextPart(""),)


def test_an_empty_list_of_parts_is_an_empty_turn() -> None:
    assert read_one([]).parts == ()


def test_an_answer_echoed_back_by_a_client_is_accepted() -> None:
    echo = {
        "role": "assistant",
        "content": "<think>a</think><answer>b</answer>",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
        "function_call": None,
        "name": "phone",
    }
    assert read_messages([echo])[0].is_string


@pytest.mark.parametrize("messages", [None, "hi", b"hi", {"role": "user", "content": "hi"}, 3, []])
def test_messages_that_are_no_list_of_messages_are_refused(messages: Any) -> None:
    with pytest.raises(PromptError, match="messages is"):
        read_messages(messages)


@pytest.mark.parametrize("message", ["hi", None, 3, ["user", "hi"]])
def test_a_message_that_is_no_object_is_refused_with_its_place(message: Any) -> None:
    with pytest.raises(PromptError, match=r"messages\[1\]"):
        read_messages([{"role": "user", "content": "hi"}, message])


@pytest.mark.parametrize("role", ["tool", "developer", "User", "", None, 3, ["user"]])
def test_an_unknown_role_is_refused(role: Any) -> None:
    with pytest.raises(PromptError, match=r"messages\[0\]\.role"):
        read_messages([{"role": role, "content": "hi"}])


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("content", [None, 3, {"type": "text", "text": "hi"}, b"hi"])
def test_content_of_another_type_is_refused(role: str, content: Any) -> None:
    with pytest.raises(PromptError, match=r"messages\[0\]\.content"):
        read_one(content, role)


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "audio", "contents"])
def test_a_key_that_the_model_cannot_see_is_refused_by_name(key: str) -> None:
    with pytest.raises(PromptError, match=f"'{key}'"):
        read_messages([{"role": "assistant", "content": "hi", key: ["x"]}])


@pytest.mark.parametrize("kind", ["video", "video_url", "input_audio", "input_image", "file", "", None, 3])
def test_an_unknown_part_type_is_refused_by_name(kind: Any) -> None:
    with pytest.raises(PromptError, match=rf"content\[1\]\.type is {kind!r}"):
        read_one([{"type": "text", "text": "a"}, {"type": kind, "text": "b"}])


@pytest.mark.parametrize(
    "part",
    [
        "hi",
        None,
        {"text": "no type"},
        {"type": "text"},
        {"type": "text", "text": None},
        {"type": "text", "text": ["a"]},
        {"type": "image_url"},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": {"url": 3}},
        {"type": "image"},
        {"type": "image", "image": 3},
        {"type": "image", "image": [1, 2]},
        {"type": "image", "path": "a.png", "url": "b.png"},
    ],
    ids=str,
)
def test_a_malformed_part_is_refused_with_its_place(part: Any) -> None:
    with pytest.raises(PromptError, match=r"messages\[0\]\.content\[0\]"):
        read_one([part])


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "no/such.png", "https://example.com/a.png"])
def test_an_image_that_cannot_be_read_is_named_by_its_place(url: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(ImageError, match=r"messages\[0\]\.content\[1\]\.image_url: "):
        read_one(parts)


def test_half_a_surrogate_pair_is_refused_with_its_place() -> None:
    with pytest.raises(PromptError, match=r"messages\[0\]\.content.*character 2"):
        read_one("ab\ud83d")


def test_parts_and_messages_made_by_hand_are_checked_too() -> None:
    with pytest.raises(PromptError, match="RGBA"):
        ImagePart(Image.new("RGBA", (2, 2)))
    with pytest.raises(PromptError, match="role"):
        Message("tool", (TextPart("a"),))
    with pytest.raises(PromptError, match="exactly one text part"):
        Message("user", (TextPart("a"), TextPart("b")), is_string=True)
