"""The decode loop, on a tiny bundle whose decoder is replaced by a script where the text matters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from autoglm_edge.errors import BundleError, ContextLengthError, DeviceError, RequestError
from autoglm_edge.runtime.engine import Engine

ASK = [{"role": "user", "content": "open settings"}]


@pytest.fixture(scope="module")
def bundle(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(checkpoint_of("tiny"), "fp32")


@pytest.fixture
def engine(bundle: Path) -> Iterator[Engine]:
    with Engine.load(bundle, threads=1) as engine:
        yield engine


class ScriptedModel:
    """The real interface of `runtime.model.Model`; its logits favour one given id after the other."""

    def __init__(self, engine: Engine, ids: list[int]) -> None:
        self.hidden = engine.bundle.manifest.geometry.hidden
        self.vocab = engine.bundle.manifest.geometry.vocab
        self.ids = ids
        self.runs: list[int] = []
        self.positions: list[np.ndarray] = []

    def encode_image(self, image: Any) -> np.ndarray:
        return np.zeros((image.tokens, self.hidden), np.float32)

    def embed(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        return np.zeros((1, len(ids), self.hidden), np.float32)

    def forward(self, embeds: np.ndarray, positions: np.ndarray, cache: Any, keep: int = 1) -> np.ndarray:
        self.runs.append(embeds.shape[1])
        self.positions.append(positions)
        cache.length += embeds.shape[1]
        logits = np.zeros((1, self.vocab), np.float32)
        decoded = len([run for run in self.runs if run == 1])
        logits[0, self.ids[min(decoded, len(self.ids) - 1)]] = 9.0
        return logits


def say(engine: Engine, text: str, *, end: str | None = "<|user|>") -> ScriptedModel:
    """Make the engine answer with this text, then with an end token."""
    ids = engine.tokenizer.encode(text)
    if end is not None:
        ids.append(engine.tokenizer.id_of(end))
    engine._model = ScriptedModel(engine, ids)
    return engine._model


def answer(engine: Engine, **options: Any) -> tuple[str, Any]:
    deltas = list(engine.chat(ASK, **options))
    return "".join(delta.text for delta in deltas), deltas[-1]


@pytest.mark.parametrize("end", ["<|user|>", "<|endoftext|>", "<|observation|>", "</answer>"])
def test_every_end_token_stops_and_stays_out_of_the_text(engine: Engine, end: str) -> None:
    say(engine, '<think>设置</think><answer>do(action="Back")', end=end)

    text, last = answer(engine)

    assert text == '<think>设置</think><answer>do(action="Back")'
    assert last.finish_reason == "stop"


def test_a_closing_answer_tag_spelled_in_ordinary_tokens_is_cut_too(engine: Engine) -> None:
    say(engine, "")
    spelled = [
        token for part in ("do() </", "ans", "wer", ">", " more") for token in engine.tokenizer.encode(part)
    ]
    assert engine.tokenizer.decode(spelled) == "do() </answer> more"
    engine._model.ids = spelled

    text, last = answer(engine)

    assert text == "do() "
    assert last.finish_reason == "stop"


def test_a_stop_string_across_tokens_ends_the_answer_before_it(engine: Engine) -> None:
    say(engine, "one two three four")

    text, last = answer(engine, stop=["o thr", "four"])

    assert text == "one tw"
    assert last.finish_reason == "stop"


def test_max_tokens_ends_with_length_and_gives_all_text(engine: Engine) -> None:
    model = say(engine, "打开设置")

    deltas = list(engine.chat(ASK, max_tokens=len(model.ids) - 1))

    assert "".join(delta.text for delta in deltas) == "打开设置"
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].usage.completion_tokens == len(model.ids) - 1


def test_no_delta_holds_half_a_character(engine: Engine) -> None:
    say(engine, "设置🙂é")

    deltas = list(engine.chat(ASK))

    assert "".join(delta.text for delta in deltas) == "设置🙂é"
    assert all("\ufffd" not in delta.text for delta in deltas)


def test_token_ids_are_all_but_the_end_token(engine: Engine) -> None:
    model = say(engine, "hello world")

    deltas = list(engine.chat(ASK))

    assert [token for delta in deltas for token in delta.token_ids] == model.ids[:-1]
    assert deltas[-1].usage.completion_tokens == len(model.ids)


def test_only_the_last_delta_carries_reason_usage_and_timings(engine: Engine) -> None:
    say(engine, "hello world")

    *early, last = engine.chat(ASK)

    assert all(delta.finish_reason is delta.usage is delta.timings is None for delta in early)
    assert last.usage.prompt_tokens == len(engine.tokenize(ASK))
    assert last.timings.ttft_ms >= last.timings.prefill_ms > 0


def test_positions_go_on_after_an_image_where_the_model_expects_them(engine: Engine) -> None:
    model = say(engine, "abc")
    picture = Image.new("RGB", (280, 140))
    ask = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what"}]}
    ]
    prompt = engine.prompt(ask)

    list(engine.chat(ask))

    decoded = [int(position[0, 0]) for position in model.positions[1:]]
    assert decoded == list(range(prompt.next_position, prompt.next_position + len(decoded)))
    assert prompt.next_position < len(prompt.ids)


def test_a_long_prompt_is_prefilled_in_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoglm_edge.runtime.engine.PREFILL_CHUNK", 8)
    model = say(engine, "ok")

    answer(engine)

    prompt = len(engine.tokenize(ASK))
    assert sum(model.runs[: -(-prompt // 8)]) == prompt
    assert max(model.runs) == 8


def test_a_prompt_that_does_not_fit_is_refused_before_any_compute(bundle: Path) -> None:
    with Engine.load(bundle, context=64) as engine:
        model = say(engine, "never")
        ask = [{"role": "user", "content": "word " * 100}]

        with pytest.raises(ContextLengthError) as caught:
            engine.chat(ask, max_tokens=5)

        assert caught.value.prompt_tokens == len(engine.tokenize(ask))
        assert (caught.value.max_tokens, caught.value.limit) == (5, 64)
        assert not model.runs


def test_a_budget_beyond_the_context_is_refused_even_for_a_short_prompt(engine: Engine) -> None:
    with pytest.raises(ContextLengthError, match="lower max_tokens"):
        engine.chat(ASK, max_tokens=engine.context)


def test_without_max_tokens_the_answer_may_fill_the_context(bundle: Path) -> None:
    with Engine.load(bundle, context=40) as engine:
        say(engine, "a " * 100, end=None)

        _, last = answer(engine)

        assert last.finish_reason == "length"
        assert last.usage.prompt_tokens + last.usage.completion_tokens == 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"logit_bias": {10**9: 1.0}}, "logit_bias names the token id 1000000000"),
    ],
)
def test_a_bad_option_is_refused_by_the_call_itself(
    engine: Engine, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        engine.chat(ASK, **options)


def test_cancelling_ends_within_one_step(engine: Engine) -> None:
    model = say(engine, "a b c d e f g")
    cancel = threading.Event()
    stream = engine.chat(ASK, cancel=cancel)
    next(stream)
    runs = len(model.runs)
    cancel.set()

    rest = list(stream)

    assert rest[-1].finish_reason == "cancelled"
    assert len(model.runs) <= runs + 1


def test_cancelling_before_the_prefill_computes_nothing(engine: Engine) -> None:
    model = say(engine, "a b c")
    cancel = threading.Event()
    cancel.set()

    (last,) = engine.chat(ASK, cancel=cancel)

    assert last.finish_reason == "cancelled"
    assert (last.text, last.usage.completion_tokens, model.runs) == ("", 0, [])


def test_a_second_answer_at_the_same_time_is_refused_and_closing_frees_the_engine(engine: Engine) -> None:
    say(engine, "a b c d")
    stream = engine.chat(ASK)
    next(stream)

    with pytest.raises(RequestError, match="another answer"):
        next(engine.chat(ASK))
    stream.close()

    assert answer(engine)[1].finish_reason == "stop"


def test_answers_do_not_depend_on_the_one_before(engine: Engine) -> None:
    first = answer(engine, max_tokens=8)[0]
    list(engine.chat([{"role": "user", "content": "something else entirely"}], max_tokens=5))

    assert answer(engine, max_tokens=8)[0] == first


def test_a_seed_repeats_an_answer_and_another_one_does_not(engine: Engine) -> None:
    options = {"max_tokens": 16, "temperature": 1.5}

    assert answer(engine, seed=1, **options)[0] == answer(engine, seed=1, **options)[0]
    assert answer(engine, seed=1, **options)[0] != answer(engine, seed=2, **options)[0]


def test_penalties_act_at_temperature_zero(engine: Engine) -> None:
    plain = [t for d in engine.chat(ASK, max_tokens=40) for t in d.token_ids]
    fresh = [
        t
        for d in engine.chat(ASK, max_tokens=40, presence_penalty=2.0, frequency_penalty=2.0)
        for t in d.token_ids
    ]

    assert len(set(fresh)) > len(set(plain))


def test_a_smaller_image_budget_makes_fewer_tokens(bundle: Path) -> None:
    picture = Image.new("RGB", (700, 1400))
    ask = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what"}]}
    ]

    with Engine.load(bundle) as usual, Engine.load(bundle, max_image_tokens=20) as small:
        assert small.prompt(ask).images[0].tokens <= 20 < usual.prompt(ask).images[0].tokens


def test_the_newline_layout_adds_one_newline_after_the_image(bundle: Path) -> None:
    picture = Image.new("RGB", (140, 140))
    ask = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what"}]}
    ]

    with Engine.load(bundle) as plain, Engine.load(bundle, image_layout="newline") as newline:
        before, after = plain.prompt(ask).text, newline.prompt(ask).text

    assert after == before.replace("<|end_of_image|>what", "<|end_of_image|>\nwhat")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"context": 0}, RequestError, "context is 0"),
        ({"context": 10**9}, RequestError, "context is 1000000000"),
        ({"max_image_tokens": 1}, RequestError, "max_image_tokens is 1"),
        ({"device": "tpu"}, DeviceError, "device is 'tpu'"),
        ({"threads": -1}, DeviceError, "threads is -1"),
    ],
)
def test_impossible_loads_are_refused(
    bundle: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Engine.load(bundle, **options)


def test_cuda_without_its_runtime_says_what_to_install(bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    with pytest.raises(DeviceError, match="install onnxruntime-gpu"):
        Engine.load(bundle, device="cuda")


def test_a_damaged_graph_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    size = (broken / "decoder.onnx").stat().st_size
    (broken / "decoder.onnx").write_bytes(b"\x00" * size)

    with pytest.raises(BundleError, match=r"decoder\.onnx cannot be loaded"):
        Engine.load(broken)


def test_scoring_refuses_unknown_ids_and_long_sequences(engine: Engine) -> None:
    with pytest.raises(RequestError, match="the model knows 0 to"):
        engine.score([0, 10**6])
    with pytest.raises(ContextLengthError):
        engine.score(np.zeros(engine.context + 1, np.int64))


def test_scoring_nothing_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="non-empty list"):
        engine.score([])
