from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from front_fixtures import POCKET, reference_tokenizer, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_edge.errors import BundleError, PromptError
from autoglm_edge.runtime.prompt.tokenizer import StreamDecoder, Tokenizer

TEXTS = [
    "",
    " ",
    "Tap the blue button, please.",
    "点击右上角的“设置”，然后返回。",
    "打开 Chrome 浏览器 and search 天气预报 for 2025年11月5日!",
    "👍🏽 family 👨‍👩‍👧‍👦 flag 🇨🇳 keycap 1️⃣",
    "tabs\tand\r\nlines\n\n\n  three   spaces \u00a0nbsp\u3000wide\u200bzero",
    "it's we'll THEY'RE 12345 3.14159 a_b-c/d\\e",
    "Ωμέγα кириллица עברית العربية हिन्दी ไทย 한국어 日本語 e\u0301 ﬁ ①",
    "\x00\x01\x7f\ufffd\ufeff\U0010ffff",
    '<think>先看屏幕</think>\n<answer>do(action="Tap", element=[500, 120])</answer>',
    "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>hi<|assistant|>\n",
    "<|user|> <|user |><|imag e|>< think><|unknown|>",
]


def stream(ids: list[int], *, skip_special: bool) -> list[str]:
    decoder = StreamDecoder(tokenizer(), skip_special=skip_special)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The pocket tokenizer with a change to its file."""
    document = json.loads((POCKET / "tokenizer.json").read_text(encoding="utf-8"))
    change(document)
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_those_of_transformers(text: str) -> None:
    reference = reference_tokenizer()
    ids = tokenizer().encode(text)
    assert ids == reference(text, add_special_tokens=False)["input_ids"]
    for skip in (False, True):
        assert tokenizer().decode(ids, skip_special=skip) == reference.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([*TEXTS, "设", "é", " ", "\n", "<think>", "<|image|>"]) | st.text(max_size=12))
)
def test_any_text_has_the_ids_of_transformers(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert tokenizer().encode(text) == reference_tokenizer()(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_encoding_and_decoding_gives_the_text_back(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 1600), max_size=40), st.booleans())
def test_a_stream_of_any_ids_joins_to_their_decoded_text(ids: list[int], skip: bool) -> None:
    assert "".join(stream(ids, skip_special=skip)) == tokenizer().decode(ids, skip_special=skip)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xE4, 0xBD, 0xA0, 0xC3, 0xA9, 0xED, 0xFF, 0x41]), max_size=12
    )
)
def test_a_stream_of_single_bytes_joins_to_their_decoded_text(raw: list[int]) -> None:
    ids = [byte_ids()[byte] for byte in raw]
    joined = "".join(stream(ids, skip_special=True))
    assert joined == tokenizer().decode(ids)
    assert joined == bytes(raw).decode("utf-8", "replace")


def byte_ids() -> dict[int, int]:
    """Id of the token that is just this byte."""
    found = {}
    for index in range(tokenizer().vocab_size):
        raw = tokenizer().bytes_of(index)
        if len(raw) == 1:
            found[raw[0]] = index
    assert len(found) == 256
    return found


def test_an_emoji_of_four_tokens_appears_with_the_last() -> None:
    ids = [byte_ids()[byte] for byte in "😀".encode()]
    assert stream(ids, skip_special=True) == ["", "", "", "😀", ""]


def test_a_character_cut_short_is_flushed_as_one_replacement() -> None:
    ids = [byte_ids()[byte] for byte in "😀".encode()[:3]]
    assert stream(ids, skip_special=True) == ["", "", "", "\ufffd"]
    assert tokenizer().decode(ids) == "\ufffd"


def test_a_flushed_decoder_starts_over() -> None:
    decoder = StreamDecoder(tokenizer())
    decoder.push(byte_ids()[0xF0])
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert decoder.push(byte_ids()[0x41]) == "A"


def test_a_stream_never_decodes_earlier_tokens_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokenizer().encode("点击 the 😀 button " * 50)
    expected = tokenizer().decode(ids)

    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("decoded as a whole")

    monkeypatch.setattr(Tokenizer, "decode", refuse)
    assert "".join(stream(ids, skip_special=True)) == expected


def test_skipping_drops_role_tokens_and_keeps_thinking_tags() -> None:
    text = "<|assistant|><think>a</think><answer>b</answer><|endoftext|>"
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids, skip_special=True) == "<think>a</think><answer>b</answer>"
    assert "".join(stream(ids, skip_special=True)) == "<think>a</think><answer>b</answer>"
    assert "".join(stream(ids, skip_special=False)) == text


def test_a_special_token_inside_a_character_does_not_break_it() -> None:
    raw = [byte_ids()[byte] for byte in "你".encode()]
    end = tokenizer().id_of("<|endoftext|>")
    assert end is not None
    ids = [raw[0], end, raw[1], raw[2]]
    assert "".join(stream(ids, skip_special=True)) == tokenizer().decode(ids, skip_special=True) == "你"


def test_an_added_token_outside_the_byte_alphabet_stands_for_its_own_text(tmp_path: Path) -> None:
    def add(document: dict[str, Any]) -> None:
        flags = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
        document["added_tokens"] += [
            {"id": 5000 + i, "content": text, **flags} for i, text in enumerate(["思考 开始", "é"])
        ]

    own = Tokenizer.from_folder(edited(tmp_path, add))
    first, second = own.id_of("思考 开始"), own.id_of("é")
    assert first is not None and second is not None
    ids = own.encode("a思考 开始b")
    assert first in ids
    decoder = StreamDecoder(own)
    assert "".join(map(decoder.push, [*ids, second])) + decoder.flush() == own.decode([*ids, second])


def test_the_vocabulary_ends_above_the_highest_id() -> None:
    reference = reference_tokenizer()
    assert tokenizer().vocab_size == max(reference.get_vocab().values()) + 1
    assert tokenizer().token_of(tokenizer().vocab_size) is None
    assert tokenizer().token_of(tokenizer().vocab_size - 1) is not None


def test_special_ids_are_those_of_transformers() -> None:
    assert tokenizer().special_ids == frozenset(reference_tokenizer().all_special_ids)


def test_ids_without_a_token_give_no_text() -> None:
    beyond = tokenizer().vocab_size + 5
    assert tokenizer().decode([beyond]) == ""
    assert stream([beyond], skip_special=True) == ["", ""]


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path: Path) -> None:
    def limit(document: dict[str, Any]) -> None:
        document["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        document["padding"] = {
            "strategy": {"Fixed": 16},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        }

    text = "a fairly long sentence to be cut"
    assert Tokenizer.from_folder(edited(tmp_path, limit)).encode(text) == tokenizer().encode(text)


def test_a_lone_surrogate_is_refused_with_its_place() -> None:
    with pytest.raises(PromptError, match="character 3"):
        tokenizer().encode("abc\ud83d")


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is not in"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"version": "1.0", "model": 3}', b"\xff\xfe"])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["decoder"] = {"type": "Fuse"}

    with pytest.raises(BundleError, match="must be ByteLevel"):
        Tokenizer.from_folder(edited(tmp_path, change))
