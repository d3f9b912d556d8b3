"""The decode loop, on a tiny bundle whose decoder is replaced by a script where the text matters."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
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

    plan = SimpleNamespace(prefill="decoder", by_decoder=lambda tokens: True)

    def __init__(self, engine: Engine, ids: list[int]) -> None:
        self.hidden = engine.bundle.manifest.geometry.hidden
        self.vocab = engine.bundle.manifest.geometry.vocab
        self.ids = ids
        self.prompt = 0
        self.prefills: list[int] = []
        self.runs: list[int] = []
        self.positions: list[np.ndarray] = []

    def encode_image(self, image: Any) -> np.ndarray:
        return np.zeros((image.tokens, self.hidden), np.float32)

    def embed(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        return np.zeros((1, len(ids), self.hidden), np.float32)

    def prefill_pieces(
        self, embeds: np.ndarray, positions: np.ndarray, cache: Any, **how: Any
    ) -> Iterator[None]:
        self.prefills.append(embeds.shape[1])
        cache.length += embeds.shape[1]
        yield

    def forward(self, embeds: np.ndarray, positions: np.ndarray, cache: Any, keep: int = 1) -> np.ndarray:
        count = embeds.shape[1]
        self.runs.append(count)
        self.positions.append(positions)
        cache.length += count
        logits = np.zeros((keep or count, self.vocab), np.float32)
        for row in range(len(logits)):
            token = cache.length - len(logits) + row - (self.prompt - 1)
            logits[row, self.ids[min(token, len(self.ids) - 1)]] = 9.0
        return logits


def say(engine: Engine, text: str, *, end: str | None = "<|user|>") -> ScriptedModel:
    """Make the engine answer with this text, then with an end token."""
    ids = engine.tokenizer.encode(text)
    if end is not None:
        ids.append(engine.tokenizer.id_of(end))
    model = ScriptedModel(engine, ids)
    engine._runner.model = model  # type: ignore[assignment]
    build = type(engine).prompt

    def prompt(messages: Any, **options: Any) -> Any:
        built = build(engine, messages, **options)
        model.prompt = len(built.ids)
        return built

    engine.prompt = prompt  # type: ignore[method-assign]
    return model


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
    engine._runner.model.ids = spelled  # type: ignore[attr-defined]

    text, last = answer(engine)

    assert text == "do() "
    assert last.finish_reason == "stop"


def test_a_stop_string_across_tokens_ends_the_answer_before_it(engine: Engine) -> None:
    say(engine, "one two three four")

    text, last = answer(engine, stop=["o thr", "four"])

    assert text == "one tw"
    assert last.finish_reason == "stop"


@pytest.mark.parametrize("stop", [" three", [" three"], (" three",), ["x"] * 9 + [" three"]])
def test_stops_are_a_string_or_any_number_of_them(engine: Engine, stop: Any) -> None:
    say(engine, "one two three four")

    assert answer(engine, stop=stop)[0] == "one two"


@pytest.mark.parametrize("stop", [None, [], ()])
def test_no_stops_are_none_or_an_empty_list(engine: Engine, stop: Any) -> None:
    say(engine, "one two three")

    assert answer(engine, stop=stop)[0] == "one two three"


def test_a_bias_takes_ids_as_json_has_them(engine: Engine) -> None:
    (wanted,) = engine.tokenizer.encode("a")

    text, _ = answer(engine, max_tokens=3, logit_bias={str(wanted): 100})

    assert text == "aaa"


@pytest.mark.parametrize("content", ["", []])
def test_a_message_without_content_is_answered(engine: Engine, content: Any) -> None:
    last = list(engine.chat([{"role": "user", "content": content}], max_tokens=2))[-1]

    assert last.usage.completion_tokens == 2


def test_a_bundle_of_half_precision_answers_on_the_cpu(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    picture = {"type": "image", "image": Image.new("RGB", (140, 140), "red")}
    with Engine.load(bundle_of(checkpoint_of("tiny"), "fp16"), threads=1) as engine:
        last = list(engine.chat([{"role": "user", "content": [picture]}], max_tokens=3))[-1]

        assert last.usage.completion_tokens == 3


def test_pictures_of_all_turns_are_encoded_in_their_order(engine: Engine) -> None:
    model = say(engine, "ok")
    seen = []
    encode = model.encode_image
    model.encode_image = lambda image: seen.append(image.original_size) or encode(image)  # type: ignore
    sizes = [(140, 140), (280, 140), (140, 280)]
    pictures = [{"type": "image", "image": Image.new("RGB", size)} for size in sizes]
    ask = [
        {"role": "user", "content": [*pictures[:2], {"type": "text", "text": "first"}]},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": [{"type": "text", "text": "second"}, pictures[2]]},
    ]

    last = list(engine.chat(ask))[-1]

    assert seen == sizes
    assert last.usage.image_tokens == sum(image.tokens for image in engine.prompt(ask).images)


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

    decoded = [int(place) for positions in model.positions[1:] for place in positions[0]]
    assert decoded == list(range(prompt.next_position, prompt.next_position + len(decoded)))
    assert prompt.next_position < len(prompt.ids)


def test_a_long_prompt_is_prefilled_in_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoglm_edge.runtime.reading.PREFILL_CHUNK", 8)
    model = say(engine, "ok")

    answer(engine)

    assert sum(model.prefills) == len(engine.tokenize(ASK)) - 1
    assert max(model.prefills) == 8
    assert model.runs[0] == 1


def test_a_prompt_that_does_not_fit_is_refused_before_any_compute(bundle: Path) -> None:
    with Engine.load(bundle, context=64) as engine:
        model = say(engine, "never")
        ask = [{"role": "user", "content": "word " * 100}]

        with pytest.raises(ContextLengthError) as caught:
            engine.chat(ask, max_tokens=5)

        assert caught.value.prompt_tokens == len(engine.tokenize(ask))
        assert (caught.value.max_tokens, caught.value.limit) == (5, 64)
        assert not model.runs + model.prefills


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
        ({"max_tokens": "5"}, "max_tokens is '5'"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"cancel": "now"}, "cancel is 'now', must be an event"),
        ({"stop": ""}, "a stop string is ''"),
        ({"stop": ["a", 5]}, "a stop string is 5"),
        ({"stop": 5}, "stop is 5, must be a string or a list"),
        ({"stop": b"a"}, "stop is b'a', must be a string or a list"),
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
    assert (last.text, last.usage.completion_tokens, model.prefills + model.runs) == ("", 0, [])


def test_a_second_answer_at_the_same_time_is_refused_and_closing_frees_the_engine(engine: Engine) -> None:
    say(engine, "a b c d")
    stream = engine.chat(ASK)
    next(stream)

    with pytest.raises(RequestError, match="another answer"):
        next(engine.chat(ASK))
    stream.close()

    assert answer(engine)[1].finish_reason == "stop"


def test_a_cancel_that_is_taken_back_ends_the_answer_all_the_same(engine: Engine) -> None:
    model = say(engine, "never")
    cancel = threading.Event()
    encode = model.encode_image

    def cancel_after_the_first(image: Any) -> np.ndarray:
        cancel.set()
        return encode(image)

    model.encode_image = cancel_after_the_first  # type: ignore
    pictures = [{"type": "image", "image": Image.new("RGB", (140, 140))}] * 3
    stream = engine.chat([{"role": "user", "content": pictures}], cancel=cancel)

    (last,) = stream

    assert (last.finish_reason, model.prefills + model.runs) == ("cancelled", [])


def test_an_iterator_that_is_forgotten_frees_the_engine(engine: Engine) -> None:
    say(engine, "a b c d")
    stream = engine.chat(ASK)
    next(stream)
    del stream
    gc.collect()

    assert answer(engine)[1].finish_reason == "stop"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_in_the_prefill_frees_the_engine(engine: Engine, error: type[BaseException]) -> None:
    model = say(engine, "a b c d")
    forward = model.forward

    def interrupted(*arguments: Any) -> np.ndarray:
        raise error

    model.forward = interrupted  # type: ignore
    with pytest.raises(error):
        next(engine.chat(ASK))
    model.forward = forward  # type: ignore

    assert answer(engine)[0] == "a b c d"


def test_of_two_threads_one_answers_and_the_other_is_refused(engine: Engine) -> None:
    model = say(engine, "a b c d")
    forward, inside, go_on = model.forward, threading.Event(), threading.Event()

    def waiting(*arguments: Any) -> np.ndarray:
        inside.set()
        assert go_on.wait(10)
        return forward(*arguments)

    model.forward = waiting  # type: ignore
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(answer(engine)[0]))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(RequestError, match="another answer"):
        next(engine.chat(ASK))
    go_on.set()
    thread.join(10)

    assert texts == ["a b c d"]


def test_a_closed_engine_says_so(bundle: Path) -> None:
    engine = Engine.load(bundle)
    engine.close()
    engine.close()

    with pytest.raises(RequestError, match="this engine is closed"):
        engine.chat(ASK)
    with pytest.raises(RequestError, match="this engine is closed"):
        engine.score([1, 2])


def test_closing_an_engine_ends_the_answer_under_way_with_an_error(bundle: Path) -> None:
    engine = Engine.load(bundle)
    stream = engine.chat(ASK)
    next(stream)
    engine.close()

    with pytest.raises(RequestError, match="this engine is closed"):
        list(stream)


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


def test_an_image_budget_above_the_bundles_changes_nothing(bundle: Path) -> None:
    with Engine.load(bundle) as usual, Engine.load(bundle, max_image_tokens=10**6) as large:
        assert large.image == usual.image


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
        ({"context": "64"}, RequestError, "context is '64'"),
        ({"context": True}, RequestError, "context is True"),
        ({"image_layout": "string"}, RequestError, "image_layout is 'string'"),
        ({"max_image_tokens": 1}, RequestError, "max_image_tokens is 1"),
        ({"max_image_tokens": "8"}, RequestError, "max_image_tokens is '8'"),
        ({"device": ["cpu"]}, DeviceError, r"device is \['cpu'\]"),
        ({"device": "tpu"}, DeviceError, "device is 'tpu'"),
        ({"threads": -1}, DeviceError, "threads is -1"),
        ({"threads": 1.5}, DeviceError, "threads is 1.5"),
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
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    size = (broken / "decoder.onnx").stat().st_size
    (broken / "decoder.onnx").write_bytes(b"\x00" * size)

    with pytest.raises(BundleError, match=r"decoder\.onnx cannot be loaded"):
        Engine.load(broken)


def edited(bundle: Path, folder: Path, section: str, **changes: Any) -> Path:
    """A copy of a bundle whose manifest says something else."""
    shutil.copytree(bundle, folder)
    document = json.loads((folder / "manifest.json").read_text())
    (document[section] if section else document).update(changes)
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("geometry", {"layers": 9}, r"decoder\.onnx: input past_key_values\.\d\.key is missing"),
        ("geometry", {"layers": 1}, r"decoder\.onnx: input past_key_values\.1\.key is unknown"),
        ("geometry", {"kv_heads": 7}, r"past_key_values\.0\.key has the shape .* must have .*7"),
        ("geometry", {"head_dim": 96}, r"past_key_values\.0\.key has the shape .* must have .*96"),
        ("geometry", {"vocab": 10**6}, r"output logits has the shape .* must have .*1000000"),
        ("geometry", {"hidden": 8}, r"embedding\.onnx: input image_features has the shape .* must have"),
        ("", {"kv_dtype": "float16"}, r"past_key_values\.0\.key is a tensor\(float\), but .* says float16"),
        ("", {"activations": "float16"}, r"image_features is a tensor\(float\), but .* says float16"),
        ("geometry", {"vocab": 100}, r"tokenizer\.json has ids up to \d+, but the decoder scores 100"),
        ("tokens", {"image": 10**6}, "names 1000000 as image token"),
        ("tokens", {"eos": [-1]}, r"tokens\.eos is -1, must be at least 0"),
    ],
)
def test_what_is_not_of_one_export_is_found_at_load_and_named(
    bundle: Path, tmp_path: Path, section: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        Engine.load(edited(bundle, tmp_path / "edited", section, **changes))


def test_a_vision_graph_of_another_export_is_found_with_the_first_picture(
    bundle: Path, tmp_path: Path
) -> None:
    picture = {"type": "image", "image": Image.new("RGB", (140, 140))}
    with Engine.load(edited(bundle, tmp_path / "edited", "image", temporal_patch_size=1)) as engine:
        assert answer(engine, max_tokens=1)
        with pytest.raises(BundleError, match=r"vision\.onnx: input pixel_values has the shape"):
            list(engine.chat([{"role": "user", "content": [picture]}], max_tokens=1))


def test_a_context_beyond_all_memory_is_refused_at_load(bundle: Path, tmp_path: Path) -> None:
    huge = edited(bundle, tmp_path / "edited", "geometry", context_length=2**50)
    with pytest.raises(DeviceError, match="not enough memory to run a context of"):
        Engine.load(huge, context=2**50)


@pytest.mark.parametrize("ids", [[1.5], ["a"], [[1], [2, 3]], None])
def test_scoring_takes_nothing_but_integers(engine: Engine, ids: Any) -> None:
    with pytest.raises(RequestError, match="integers"):
        engine.score(ids)


@pytest.mark.parametrize("images", ["screen.png", b"bytes", Image.new("RGB", (9, 9))])
def test_scoring_takes_a_list_of_images(engine: Engine, images: Any) -> None:
    with pytest.raises(RequestError, match="must be a list of images"):
        engine.score([1, 2], images)


def test_whole_numbers_of_numpy_are_numbers(bundle: Path) -> None:
    with Engine.load(bundle, context=np.int64(100), max_image_tokens=np.int32(20)) as engine:  # type: ignore
        assert answer(engine, max_tokens=np.int64(2))[1].usage.completion_tokens == 2


def test_a_prompt_is_scored_at_its_last_position_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoglm_edge.runtime.reading.PREFILL_CHUNK", 8)
    shapes = []
    forward = engine._runner.model.forward

    def recorded(*arguments: Any, **options: Any) -> np.ndarray:
        logits = forward(*arguments, **options)
        shapes.append(logits.shape)
        return logits

    monkeypatch.setattr(engine._runner.model, "forward", recorded)
    answer(engine, max_tokens=2)

    assert len(shapes) > 2
    assert set(shapes) == {(1, engine.bundle.manifest.geometry.vocab)}


def test_scoring_refuses_unknown_ids_and_long_sequences(engine: Engine) -> None:
    with pytest.raises(RequestError, match="the model knows 0 to"):
        engine.score([0, 10**6])
    with pytest.raises(ContextLengthError):
        engine.score(np.zeros(engine.context + 1, np.int64))


def test_scoring_nothing_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="non-empty list"):
        engine.score([])
