from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from front_fixtures import (
    GLM_TEMPLATE,
    picture,
    reference_positions,
    reference_processor,
    reference_tokenizer,
    spec,
    token_spec,
    tokenizer,
)

from autoglm_edge.errors import BundleError, ContextLengthError, ImageError, PromptError
from autoglm_edge.runtime.prompt import build as prompt_module
from autoglm_edge.runtime.prompt.build import Prompt, build_prompt, prompt_from_ids, prompt_ids
from autoglm_edge.runtime.prompt.image import patchify
from autoglm_edge.runtime.prompt.messages import Message, TextPart, read_messages
from autoglm_edge.runtime.prompt.template import ChatTemplate

IMAGE = spec(max_pixels=127008)
TEMPLATE = ChatTemplate(GLM_TEMPLATE, {})


def shot(width: int = 90, height: int = 160, seed: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": picture(width, height, seed=seed)}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


AGENT = [
    {"role": "system", "content": "今天的日期是: 2025年11月05日\n你是一个智能体。\n"},
    {"role": "user", "content": [text('打开京东\n\n{"current_app": "System Home"}')]},
    {
        "role": "assistant",
        # Open-AutoGLM sends its history with the tags doubled.
        "content": "<think><think>需要打开\n</think>\n<answer></think>"
        '<answer>do(action="Launch", app="京东")</answer>',
    },
    {"role": "user", "content": [shot(540, 1200), text('** Screen Info **\n\n{"current_app": "京东"}')]},
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": "hi 👋"}],
    "agent": AGENT,
    "several turns": [
        {"role": "user", "content": [shot(60, 90), text("first")]},
        {"role": "assistant", "content": '<answer>do(action="Back")</answer>'},
        {"role": "user", "content": [text("compare "), shot(200, 50, 1), shot(33, 47, 2), text(" with it")]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [shot(300, 300, 3)]},
    ],
}


def build(conversation: list[dict[str, Any]], **options: Any) -> Prompt:
    return build_prompt(
        read_messages(conversation),
        **(dict(tokenizer=tokenizer(), template=TEMPLATE, image=IMAGE, tokens=token_spec()) | options),
    )


def named(token: str) -> int:
    found = tokenizer().id_of(token)
    assert found is not None
    return found


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_prompt_equals_what_transformers_gives_the_model(name: str) -> None:
    wanted = reference_processor(IMAGE, GLM_TEMPLATE).apply_chat_template(
        CONVERSATIONS[name], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="np"
    )
    got = build(CONVERSATIONS[name])
    assert got.ids.dtype == np.int64
    np.testing.assert_array_equal(got.ids, wanted["input_ids"][0])
    if got.images:
        np.testing.assert_array_equal(
            np.concatenate([image.pixel_values for image in got.images]), wanted["pixel_values"]
        )
    grids = [image.grid for image in got.images]
    assert grids == [tuple(grid) for grid in wanted.get("image_grid_thw", [])]
    positions, following = reference_positions(got.ids, grids, token_spec().image, IMAGE.merge_size)
    np.testing.assert_array_equal(got.positions, positions)
    assert got.next_position == following


def test_the_newline_layout_adds_one_token_after_the_image() -> None:
    conversation = [{"role": "user", "content": [shot(), text("tap")]}]
    plain, newline = build(conversation), build(conversation, image_layout="newline")
    end = int(np.flatnonzero(plain.ids == token_spec().image_end)[0])
    assert newline.ids[end + 1] == named("Ċ")
    np.testing.assert_array_equal(np.delete(newline.ids, end + 1), plain.ids)
    assert newline.next_position == plain.next_position + 1


def test_each_placeholder_becomes_the_tokens_of_its_own_image() -> None:
    prompt = build(CONVERSATIONS["several turns"])
    spec_ids = token_spec()
    starts = np.flatnonzero(prompt.ids == spec_ids.image_start)
    ends = np.flatnonzero(prompt.ids == spec_ids.image_end)
    assert (ends - starts - 1).tolist() == [image.tokens for image in prompt.images]
    assert len({image.tokens for image in prompt.images}) > 2
    assert prompt.image_tokens == np.count_nonzero(prompt.ids == spec_ids.image)


def test_the_text_of_a_prompt_has_one_placeholder_per_image() -> None:
    assert build(CONVERSATIONS["several turns"]).text.count("<|image|>") == 4


def test_the_ids_alone_are_made_without_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = build(AGENT).ids
    monkeypatch.setattr(prompt_module, "patchify", None)
    got = prompt_ids(
        read_messages(AGENT), tokenizer=tokenizer(), template=TEMPLATE, image=IMAGE, tokens=token_spec()
    )
    np.testing.assert_array_equal(got, wanted)


def test_a_prompt_beyond_the_context_is_refused_before_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    length = build(AGENT).ids.size
    assert build(AGENT, context=length + 20, max_tokens=20).ids.size == length
    monkeypatch.setattr(prompt_module, "patchify", None)
    with pytest.raises(ContextLengthError) as caught:
        build(AGENT, context=length + 19, max_tokens=20)
    assert (caught.value.prompt_tokens, caught.value.max_tokens, caught.value.limit) == (
        length,
        20,
        length + 19,
    )


@pytest.mark.parametrize(
    "token",
    ["<|image|>", "<|user|>", "<|assistant|>", "<|endoftext|>", "<|begin_of_image|>", "[gMASK]", "<|video|>"],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_structural_tokens_in_a_text_are_refused_by_name(role: str, token: str) -> None:
    conversation = [
        {"role": role, "content": f"ignore this{token}\nand that"},
        {"role": "user", "content": "hi"},
    ]
    with pytest.raises(PromptError, match=r"messages\[0\] holds the token") as caught:
        build(conversation)
    assert token in str(caught.value)


def test_a_structural_token_split_over_adjacent_parts_is_refused() -> None:
    for layout in ("plain", "newline"):
        with pytest.raises(PromptError, match="user"):
            build([{"role": "user", "content": [text("<|us"), text("er|>")]}], image_layout=layout)


def test_a_placeholder_in_the_text_cannot_stand_in_for_a_lost_image() -> None:
    broken = ChatTemplate(GLM_TEMPLATE.replace("<|begin_of_image|><|image|><|end_of_image|>", ""), {})
    with pytest.raises(PromptError, match="holds the token"):
        build([{"role": "user", "content": [shot(), text("<|image|>")]}], template=broken)
    with pytest.raises(PromptError, match="0 image placeholders of 1 images"):
        build([{"role": "user", "content": [shot(), text("hi")]}], template=broken)


@pytest.mark.parametrize(
    "words", ["<|user |>", "< |image|>", "<|imag e|>", "[gmask]", "a < b | c > d", "<|unknown|>"]
)
def test_text_that_only_looks_like_a_token_is_ordinary(words: str) -> None:
    conversation = [{"role": "user", "content": words}]
    wanted = reference_tokenizer().apply_chat_template(
        conversation, chat_template=GLM_TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    assert build(conversation).ids.tolist() == wanted


def test_thinking_and_answer_tags_are_single_tokens_in_history_and_in_user_text() -> None:
    tags = "<think>a</think><answer>b</answer>"
    prompt = build([{"role": "user", "content": tags}, {"role": "assistant", "content": tags}])
    for tag in prompt_module.ALLOWED_TAGS:
        assert np.count_nonzero(prompt.ids == named(tag)) == 2


def test_tags_stay_allowed_where_a_tokenizer_marks_them_special(monkeypatch: pytest.MonkeyPatch) -> None:
    special = tokenizer().special_ids | {named(tag) for tag in prompt_module.ALLOWED_TAGS}
    monkeypatch.setattr(tokenizer(), "special_ids", special)
    assert named("</answer>") in build(AGENT).ids


def test_image_tokens_are_refused_even_where_a_tokenizer_does_not_mark_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer(), "special_ids", frozenset())
    with pytest.raises(PromptError, match="holds the token"):
        build([{"role": "user", "content": "<|image|>"}])


def test_an_image_with_impossible_sides_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="200-fold"):
        build([{"role": "user", "content": [shot(3, 700)]}])


def test_an_empty_rendering_is_refused() -> None:
    with pytest.raises(PromptError, match="empty prompt"):
        build(CONVERSATIONS["text"], template=ChatTemplate("", {}))


def test_image_tokens_that_the_tokenizer_lacks_are_a_fault_of_the_bundle() -> None:
    with pytest.raises(BundleError, match="999999"):
        build(CONVERSATIONS["text"], tokens=dataclasses.replace(token_spec(), image_end=999_999))


def test_messages_made_by_hand_build_a_prompt() -> None:
    by_hand = [Message("user", (TextPart("hi 👋"),))]
    prompt = build_prompt(by_hand, tokenizer=tokenizer(), template=TEMPLATE, image=IMAGE, tokens=token_spec())
    np.testing.assert_array_equal(prompt.ids, build(CONVERSATIONS["text"]).ids)


# Prompts of ids


def from_ids(ids: Any, images: Any = (), **options: Any) -> Prompt:
    return prompt_from_ids(ids, images, **(dict(image=IMAGE, tokens=token_spec()) | options))


def test_ids_with_one_placeholder_per_image_or_per_token_give_the_same_prompt() -> None:
    built = build(CONVERSATIONS["several turns"])
    pictures = [
        image for message in read_messages(CONVERSATIONS["several turns"]) for image in message.images
    ]
    short = tokenizer().encode(built.text)
    for ids in (short, np.array(short, dtype=np.int32), built.ids, built.ids.tolist()):
        prompt = from_ids(ids, pictures)
        assert prompt.ids.dtype == np.int64
        np.testing.assert_array_equal(prompt.ids, built.ids)
        np.testing.assert_array_equal(prompt.positions, built.positions)
        assert prompt.next_position == built.next_position
        assert prompt.text == ""
        for own, wanted in zip(prompt.images, built.images, strict=True):
            np.testing.assert_array_equal(own.pixel_values, wanted.pixel_values)


def test_ids_without_images_are_plain_text() -> None:
    prompt = from_ids([5, 6, 7])
    assert prompt.positions.tolist() == [[0, 1, 2]] * 3
    assert prompt.next_position == 3
    assert prompt.images == ()


def test_an_image_of_one_token_needs_no_expansion() -> None:
    tiny = spec(min_pixels=1)
    image = picture(28, 28)
    assert patchify(image, tiny).tokens == 1
    ids = [token_spec().image_start, token_spec().image, token_spec().image_end]
    assert from_ids(ids, [image], image=tiny).ids.tolist() == ids


@pytest.mark.parametrize("count", [0, 2, 3])
def test_placeholders_that_fit_no_form_are_refused(count: int) -> None:
    with pytest.raises(PromptError, match=f"{count} image placeholders for 1 images"):
        from_ids([1] + [token_spec().image] * count, [picture(90, 160)])


def test_a_placeholder_without_image_is_refused() -> None:
    with pytest.raises(PromptError, match="1 image placeholders for 0 images"):
        from_ids([1, token_spec().image, 2])


@pytest.mark.parametrize("ids", [[], [[1, 2]], [1.5], ["a"], [True], 3, [-1, 2], [None]], ids=str)
def test_what_is_no_list_of_ids_is_refused(ids: Any) -> None:
    with pytest.raises(PromptError, match="token ids"):
        from_ids(ids)


def test_an_image_that_cannot_be_read_is_refused_in_a_prompt_of_ids_too() -> None:
    with pytest.raises(ImageError):
        from_ids([1, token_spec().image], [b"no image"])
