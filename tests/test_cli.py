import hashlib
import inspect
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from autoglm_edge import cli, cli_common, cli_export
from autoglm_edge.errors import ContextLengthError, ExportError
from autoglm_edge.quantize.formats import BlockFormat
from autoglm_edge.runtime.answer import Delta, Timings, Usage
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.manifest import (
    FileEntry,
    Geometry,
    ImageSpec,
    Manifest,
    Part,
    Source,
    TokenSpec,
)

TAP = '<think>Here.</think><answer>do(action="Tap", element=[500,250])'


def invoke(*arguments, command=cli.cli, **options):
    return CliRunner().invoke(
        command, [str(argument) for argument in arguments], prog_name="autoglm", **options
    )


class FakeEngine:
    """Answers from a queue through the interface of the real engine, and remembers what it was asked."""

    answers: list = []  # noqa: RUF012 - reset by the fixture
    loads: list = []  # noqa: RUF012
    chats: list = []  # noqa: RUF012

    @classmethod
    def load(cls, path, **options):
        inspect.signature(Engine.load).bind(path, **options)
        cls.loads.append({"path": path, **options})
        return cls()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def chat(self, messages, **options):
        inspect.signature(Engine.chat).bind(self, messages, **options)
        self.chats.append(SimpleNamespace(messages=[dict(message) for message in messages], options=options))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return self._deltas(answer, options.get("cancel"))

    def _deltas(self, answer, cancel):
        for number, character in enumerate(answer):
            if cancel is not None and cancel.is_set():
                break
            if character == "\x03":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                yield Delta(character, (number,))
        stopped = cancel is not None and cancel.is_set()
        yield Delta(
            "",
            (),
            "cancelled" if stopped else "stop",
            Usage(prompt_tokens=90, image_tokens=72, completion_tokens=len(answer)),
            Timings(20.0, 100.0, 50.0, 121.0, prompt_tokens=90, decoded_tokens=10),
        )


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr("autoglm_edge.runtime.engine.Engine", FakeEngine)
    FakeEngine.answers, FakeEngine.loads, FakeEngine.chats = [TAP], [], []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of some shells
    yield FakeEngine
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    files = []
    for part in ("decoder", "embedding", "vision"):
        for name in (f"{part}.onnx", f"{part}.onnx.data"):
            content = name.encode() * 100
            (folder / name).write_bytes(content)
            files.append(FileEntry(name, len(content), hashlib.sha256(content).hexdigest()))
    manifest = Manifest(
        format_version=1,
        created_by="autoglm-edge 0.1.0",
        tools={},
        source=Source("pocket", None, "0" * 64, 3_570_000),
        geometry=Geometry(40, 4096, 32, 2, 128, 151552, 65536),
        image=ImageSpec(14, 2, 2, 12544, 9633792, (0.5,) * 3, (0.5,) * 3, 1 / 255, 3),
        tokens=TokenSpec((1,), None, 2, 3, 4),
        recipe={"name": "int4"},
        activations="float32",
        kv_dtype="float32",
        kv_bytes_per_token=81920,
        parts={
            name: Part(f"{name}.onnx", f"{name}.onnx.data", 1300)
            for name in ("decoder", "embedding", "vision")
        },
        generation={},
        files=tuple(files),
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


@pytest.fixture
def screen(tmp_path):
    path = tmp_path / "screen.png"
    Image.new("RGBA", (200, 400)).save(path)
    return path


# autoglm run


def test_an_answer_is_printed_to_stdout_and_its_counts_to_stderr(engine, bundle):
    result = invoke("run", bundle, "打开设置")

    assert result.exit_code == 0
    assert result.stdout == TAP + "\n"
    assert "90 prompt tokens (72 of images)" in result.stderr
    assert "decode 200.0 tokens/s" in result.stderr
    assert engine.chats[0].messages == [{"role": "user", "content": [{"type": "text", "text": "打开设置"}]}]


def test_pictures_stand_before_the_text_and_the_system_prompt_first(engine, bundle, screen):
    assert invoke("run", bundle, "hi", "-i", screen, "-i", screen, "--system", "be brief").exit_code == 0

    system, user = engine.chats[0].messages
    assert system == {"role": "system", "content": "be brief"}
    assert [part["type"] for part in user["content"]] == ["image", "image", "text"]
    assert user["content"][0]["image"].size == (200, 400)


def test_a_system_prompt_comes_from_a_file_as_it_stands(engine, bundle, tmp_path):
    (tmp_path / "system.txt").write_text("今天\n", encoding="utf-8")

    assert invoke("run", bundle, "hi", "--system", f"@{tmp_path / 'system.txt'}").exit_code == 0
    assert engine.chats[0].messages[0]["content"] == "今天\n"
    assert invoke("run", bundle, "hi", "--system", "@nowhere.txt").exit_code == 2


def test_text_comes_from_standard_input(engine, bundle):
    assert invoke("run", bundle, "-", input="from a pipe\n").exit_code == 0
    assert engine.chats[0].messages[0]["content"] == [{"type": "text", "text": "from a pipe"}]


@pytest.mark.parametrize(("data", "message"), [(b" \n", "is empty"), (b"ab\xff", "not UTF-8 text (byte 2)")])
def test_standard_input_without_text_is_wrong_usage(engine, bundle, data, message):
    result = invoke("run", bundle, "-", input=data)

    assert result.exit_code == 2
    assert f"standard input {'is ' if 'UTF' in message else ''}{message}" in result.stderr
    assert not engine.loads


def test_the_last_line_is_a_document_with_the_action_in_both_scales(engine, bundle, screen):
    result = invoke("run", bundle, "hi", "-i", screen, "--json")

    document = json.loads(result.stdout.splitlines()[-1])
    assert document["text"] == TAP
    assert document["thinking"] == "Here."
    assert document["action"] == {"type": "Tap", "element": [500, 250], "element_pixels": [100, 100]}
    assert document["usage"] == {
        "prompt_tokens": 90, "image_tokens": 72, "completion_tokens": len(TAP), "cached_tokens": 0,
    }  # fmt: skip
    assert document["timings"]["ttft_ms"] == 121.0
    assert document["timings"]["prefill_tokens_per_s"] == 900.0
    assert document["finish_reason"] == "stop"
    assert result.stdout.startswith(TAP + "\n")


def test_options_reach_the_engine_only_if_they_were_given(engine, bundle):
    invoke("run", bundle, "hi")
    assert engine.chats[0].options == {"stop": (), "cancel": None, "max_tokens": 3000}
    assert engine.loads[0]["device"] == "cpu"

    engine.answers.append("x")
    invoke(
        "run", bundle, "hi", "--temperature", 0.5, "--top-p", 0.8, "--top-k", 5, "--min-p", 0.1,
        "--repetition-penalty", 1.1, "--frequency-penalty", 0.2, "--presence-penalty", -0.1, "--seed", 7,
        "--stop", "a", "--stop", "b", "--max-tokens", 9, "--context", 4096, "--threads", 2,
        "--image-layout", "newline", "--max-image-tokens", 100,
    )  # fmt: skip
    assert engine.chats[1].options == {
        "temperature": 0.5, "top_p": 0.8, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
        "frequency_penalty": 0.2, "presence_penalty": -0.1, "seed": 7, "stop": ("a", "b"), "max_tokens": 9,
        "cancel": None,
    }  # fmt: skip
    loaded = engine.loads[1]
    assert (loaded["context"], loaded["threads"], loaded["image_layout"]) == (4096, 2, "newline")
    assert loaded["max_image_tokens"] == 100


def test_without_max_tokens_a_small_context_is_used_up_rather_than_refused(engine, bundle):
    engine.answers = [ContextLengthError(1000, 3000, 2048), "fits"]

    assert invoke("run", bundle, "hi").stdout == "fits\n"
    assert "max_tokens" not in engine.chats[1].options

    engine.answers = [ContextLengthError(1000, 3000, 2048)]
    assert invoke("run", bundle, "hi", "--max-tokens", 3000).exit_code == 1


def test_an_action_is_drawn_on_the_last_picture(engine, bundle, screen, tmp_path):
    result = invoke("run", bundle, "hi", "-i", screen, "--draw", tmp_path / "out.png", "--json")

    assert result.exit_code == 0
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == (200, 400)
        assert drawn.convert("L").getextrema()[1] > 0
    assert json.loads(result.stdout.splitlines()[-1])["drawing"] == str(tmp_path / "out.png")


def test_an_answer_without_action_cannot_be_drawn_but_is_printed(engine, bundle, screen, tmp_path):
    engine.answers = ["no idea"]

    result = invoke("run", bundle, "hi", "-i", screen, "--draw", tmp_path / "out.png", "--json")

    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["action"] is None
    assert "Error: the answer holds no action" in result.stderr
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'OUT'"),
        (["run", "B"], "say what to answer"),
        (["run", "B", "  "], "TEXT is empty"),
        (["run", "B", "hi", "--draw", "x.png"], "needs a picture"),
        (["run", "B", "hi", "-i", "S", "--draw", "x.txt"], "picture format"),
        (["run", "B", "hi", "-i", "S", "--draw", "nowhere/x.png"], "does not exist"),
        (["run", "B", "hi", "-i", "S", "--draw", "S"], "would overwrite a picture"),
        (["run", "B", "hi", "--stop", ""], "a stop string is ''"),
        (["run", "B", "--chat", "--json"], "--json is for a single answer"),
        (["run", "B", "--chat", "-"], "- is for a single answer"),
        (["run", "B", "hi", "--temperature", "3"], "temperature is 3.0, must be a number from 0 to 2"),
        (["run", "B", "hi", "--top-k", "-5"], "top_k is -5"),
        (["run", "B", "hi", "--max-tokens", "0"], "--max-tokens"),
        (["run", "B", "hi", "--device", "tpu"], "--device"),
        (["export", "--int4", "--int8"], "choose one of --int4, --int8"),
        (["export", "--int4", "--recipe", "int8"], "not both"),
        (["export", "--block-size", "48"], "--block-size"),
        (["walk"], "No such command"),
    ],
)
def test_wrong_usage_exits_with_2_before_anything_is_loaded(engine, bundle, screen, arguments, message):
    result = invoke(*[{"B": bundle, "S": screen}.get(argument, argument) for argument in arguments])

    assert result.exit_code == 2
    assert message in result.stderr
    assert engine.loads == []


@pytest.mark.parametrize("command", [("run", "{}", "hi"), ("info", "{}")])
def test_a_checkpoint_in_place_of_a_bundle_is_explained(tmp_path, command):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")

    result = invoke(*[argument.format(tmp_path) for argument in command])

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {tmp_path} is a checkpoint, not a bundle; run `autoglm export {tmp_path}` first\n"
    )


def test_a_missing_bundle_and_a_missing_picture_are_one_sentence_each(tmp_path, bundle):
    for arguments in (("run", tmp_path / "nowhere", "hi"), ("run", bundle, "hi", "-i", tmp_path / "no.png")):
        result = invoke(*arguments)

        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.splitlines()) == 1


def test_an_error_of_the_engine_is_one_sentence(engine, bundle):
    engine.answers = [ContextLengthError(9000, 10, 4096)]

    result = invoke("run", bundle, "hi")

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: the prompt has 9000 tokens")
    assert "Traceback" not in result.output


def test_ctrl_c_exits_with_130_and_without_a_traceback(engine, bundle):
    engine.answers = ["ab\x03cd"]

    result = invoke("run", bundle, "hi")

    assert result.exit_code == 130
    assert result.stdout == "ab\n"
    assert result.stderr == "Interrupted\n"


# autoglm run --chat


def test_a_conversation_keeps_its_history_and_pictures(engine, bundle, screen):
    engine.answers = ["one", "two", "three"]

    result = invoke(
        "run", bundle, "--chat", "--system", "S", input=f"/image {screen}\nA\n\nB\n/reset\nC\n/quit\nD\n"
    )

    assert result.exit_code == 0
    assert result.stdout == "one\ntwo\nthree\n"
    roles = [[message["role"] for message in chat.messages] for chat in engine.chats]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert [part["type"] for part in engine.chats[1].messages[1]["content"]] == ["image", "text"]
    assert engine.chats[1].messages[2]["content"] == "one"
    assert [part["type"] for part in engine.chats[2].messages[1]["content"]] == ["text"]


def test_a_conversation_can_begin_with_text_and_picture_of_the_command_line(engine, bundle, screen):
    engine.answers = ["one"]

    assert invoke("run", bundle, "hello", "-i", screen, "--chat", input="").exit_code == 0
    assert [part["type"] for part in engine.chats[0].messages[0]["content"]] == ["image", "text"]


def test_ctrl_c_in_a_conversation_cancels_the_answer_and_keeps_what_was_said(engine, bundle):
    engine.answers = ["ab\x03cd", "next"]

    result = invoke("run", bundle, "--chat", input="A\nB\n")

    assert result.exit_code == 0
    assert result.stdout == "ab\nnext\n"
    assert "cancelled" in result.stderr
    assert [message["content"] for message in engine.chats[1].messages if message["role"] == "assistant"] == [
        "ab"
    ]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_question_that_fails_is_forgotten_but_its_picture_is_kept(engine, bundle, screen):
    engine.answers = [ContextLengthError(9000, 10, 4096), "fine"]

    result = invoke("run", bundle, "--chat", input=f"/image {screen}\nA\nB\n")

    assert result.exit_code == 0
    assert "Error: the prompt has 9000 tokens" in result.stderr
    assert [part["type"] for part in engine.chats[1].messages[0]["content"]] == ["image", "text"]
    assert engine.chats[1].messages[0]["content"][1]["text"] == "B"
    assert len(engine.chats[1].messages) == 1


def test_unknown_commands_and_missing_pictures_do_not_end_a_conversation(engine, bundle):
    result = invoke("run", bundle, "--chat", input="/dance\n/image nowhere.png\n/help\n/quit\n")

    assert result.exit_code == 0
    assert result.stderr.count("Error:") == 2
    assert "/reset" in result.stderr
    assert engine.chats == []


# autoglm export


@dataclass
class _Report:
    def to_table(self):
        return "table"

    def to_json(self):
        return '{"total_bytes": 5}'


@pytest.fixture
def pipeline(monkeypatch, bundle):
    from autoglm_edge.export import pipeline as real
    from autoglm_edge.export.progress import ProgressEvent
    from autoglm_edge.runtime.bundle import Bundle

    calls = []
    signatures = {name: inspect.signature(getattr(real, name)) for name in ("export", "estimate")}

    def export(model, output, *, progress, **options):
        signatures["export"].bind(model, output, progress=progress, **options)
        calls.append(SimpleNamespace(model=model, output=output, **options))
        progress(ProgressEvent("checkpoint", "pocket", 0, 0))
        progress(ProgressEvent("resume", "continuing", 0, 0))
        for done in range(0, 1001, 10):
            progress(ProgressEvent("weights", "a.weight", done, 1000))
        progress(ProgressEvent("hash", "decoder.onnx.data", 10, 10))
        return Bundle.open(bundle)

    def estimate(model, output, **options):
        signatures["estimate"].bind(model, output, **options)
        calls.append(SimpleNamespace(model=model, output=output, **options))
        return _Report()

    monkeypatch.setattr(real, "export", export)
    monkeypatch.setattr(real, "estimate", estimate)
    return calls


def test_without_a_model_the_pocket_model_is_exported_and_the_output_says_so(pipeline):
    result = invoke("export")

    assert result.exit_code == 0
    assert "taking pocket" in result.stderr
    assert pipeline[0].model is None
    assert pipeline[0].output == Path("pocket-int4")
    assert pipeline[0].precision == "int4"


def test_export_options_reach_the_pipeline(pipeline, tmp_path):
    result = invoke(
        "export", "zai-org/AutoGLM-Phone-9B", "--int8", "-o", tmp_path / "x", "--block-size", 32,
        "--symmetric",
        "--max-image-tokens", 600, "--activations", "float16", "--accuracy-level", 0, "--revision", "abc",
        "--resume", "--force", "--refine", "gptq", "--calibration", "prompts.jsonl",
        "--prefill", "int8", "--kv", "int8",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert vars(pipeline[0]) == {
        "model": "zai-org/AutoGLM-Phone-9B", "output": tmp_path / "x", "precision": "int8", "recipe": None,
        "block_size": 32, "symmetric": True, "max_image_tokens": 600, "activations": "float16",
        "accuracy_level": 0, "revision": "abc", "resume": True, "force": True, "refine": "gptq",
        "calibration": Path("prompts.jsonl"), "prefill": "int8", "kv": "int8",
    }  # fmt: skip


@pytest.fixture
def auto(monkeypatch):
    """The search for a recipe, replaced by one that notes what it was asked."""
    from autoglm_edge.autorecipe import search as real
    from autoglm_edge.export.progress import ProgressEvent
    from autoglm_edge.quantize.recipe import PRESETS

    calls = []
    signature = inspect.signature(real.auto_recipe)

    def auto_recipe(model, reference, budget_bytes, *, progress, **rest):
        signature.bind(model, reference, budget_bytes, progress=progress, **rest)
        progress(ProgressEvent("measure", "layer 1 at 4 bits", 0, 0))
        calls.append(SimpleNamespace(model=model, reference=reference, budget_bytes=budget_bytes, **rest))
        return PRESETS["int4-mixed"]

    monkeypatch.setattr(real, "auto_recipe", auto_recipe)
    return calls


def test_a_recipe_made_by_measurement_is_what_is_exported(pipeline, auto, tmp_path):
    result = invoke(
        "export", "--recipe", "auto", "--budget-gb", 0.0065, "--reference", tmp_path / "ref.safetensors",
        "--block-size", 32, "--refine", "search", "--accuracy-level", 0, "--max-image-tokens", 600,
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    (asked,) = auto
    assert (asked.model, asked.reference) == (None, tmp_path / "ref.safetensors")
    assert asked.budget_bytes == 6_500_000
    assert asked.workspace == Path("pocket-auto.auto")
    assert asked.options.max_image_tokens == 600
    high, low = asked.options.levels
    assert {(rule.format.block_size, rule.refine) for rule in low.rules} == {(32, "search")}
    blocks = [rule for rule in high.rules if isinstance(rule.format, BlockFormat)]
    assert {(rule.format.block_size, rule.refine) for rule in blocks} == {(128, "none")}
    assert high.accuracy_level == low.accuracy_level == 0
    (exported,) = pipeline
    assert exported.recipe.name == "int4-mixed"
    assert not {"block_size", "refine", "accuracy_level"} & set(vars(exported))
    assert exported.output == Path("pocket-auto")
    assert "layer 1 at 4 bits" in result.stderr
    assert "Chose int4-mixed; levels and measurements are in pocket-auto.auto" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "auto"], "--recipe auto needs --budget-gb"),
        (["--recipe", "auto", "--budget-gb", "5"], "--recipe auto needs --reference"),
        (["--recipe", "auto", "--reference", "r"], "--recipe auto needs --budget-gb"),
        (["--budget-gb", "5"], "--budget-gb means something with --recipe auto only"),
        (["--int4", "--reference", "r"], "--reference means something with --recipe auto only"),
        (["--recipe", "int8", "--workspace", "w"], "--workspace means something with --recipe auto only"),
        (["--recipe", "auto", "--budget-gb", "0", "--reference", "r"], "0.0 is not in the range"),
        (["--recipe", "auto", "--budget-gb", "nan", "--reference", "r"], "must be a finite number"),
        (["--recipe", "auto", "--budget-gb", "inf", "--reference", "r"], "must be a finite number"),
        (["--recipe", "auto", "--budget-gb", "5", "--reference", "r", "--estimate"], "cannot be estimated"),
        (
            ["--recipe", "auto", "--budget-gb", "5", "--reference", "r", "--prefill", "int8"],
            "keeps a budget that --prefill int8 is no part of",
        ),
        (
            ["--recipe", "auto", "--budget-gb", "5", "--reference", "r", "--kv", "int8"],
            "keeps a budget that --kv int8 is no part of",
        ),
        (
            ["--recipe", "auto", "--budget-gb", "5", "--reference", "r", "--calibration", "c"],
            "with --refine gptq only",
        ),
        (["--refine", "best"], "'best' is not one of 'none', 'search', 'gptq'"),
    ],
)
def test_what_an_automatic_recipe_needs_and_what_means_nothing_without_it(pipeline, auto, arguments, message):
    result = invoke("export", *arguments)

    assert result.exit_code == 2
    assert message in result.stderr
    assert pipeline == auto == []


def test_a_note_takes_the_place_of_the_bar_on_a_terminal_and_is_a_line_elsewhere(monkeypatch, capsys):
    now = iter((0.0, 0.1, 1.5, 1.6))
    line = cli_common.ProgressLine(clock=lambda: next(now))
    for number in range(4):
        line.note(f"layer {number}")
    assert capsys.readouterr().err == "layer 0\nlayer 2\n"

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    line = cli_common.ProgressLine()
    line.note("layer 1")
    line.note("layer 2")
    line.close()
    assert capsys.readouterr().err == "\r\x1b[Klayer 1\r\x1b[Klayer 2\n"


def test_progress_without_a_terminal_is_a_line_per_tenth(capsys):
    now = iter(range(0, 10_000, 2))
    line = cli_common.ProgressLine(clock=lambda: float(next(now)))

    for done in range(0, 1001, 10):
        line.show("Weights", done, 1000)

    lines = capsys.readouterr().err.splitlines()
    assert [text.split()[1] for text in lines] == [str(tenth) for tenth in range(10, 101, 10)]
    assert lines[4] == "Weights: 50 % of 1.0 kB, 100 s"


def test_an_export_ends_with_what_to_do_next(pipeline):
    result = invoke("export", "-o", "my phone")

    assert result.stderr.splitlines()[-1] == (
        "Done in 0 s; ask it with: autoglm run 'my phone' --image SCREENSHOT TASK"
    )


@pytest.mark.parametrize("output", ["", "  "])
def test_an_empty_output_is_wrong_usage(pipeline, output):
    result = invoke("export", "-o", output)

    assert result.exit_code == 2
    assert "the output is empty" in result.stderr


def test_progress_of_a_quick_stage_is_one_line(pipeline, monkeypatch):
    monkeypatch.setattr(cli_common.ProgressLine.__init__, "__defaults__", (lambda: 0.0,))

    result = invoke("export")

    assert result.stderr.splitlines()[1:-1] == [
        "continuing",
        "Weights: 100 % of 1.0 kB, 0 s",
        "Checking: 100 % of 10 B, 0 s",
    ]


def test_an_export_ends_with_one_document(pipeline, bundle):
    result = invoke("export", "--json")

    document = json.loads(result.stdout.splitlines()[-1])
    assert document["bundle"] == "pocket-int4"
    assert document["recipe"] == "int4"
    assert document["weight_bytes"] == {"decoder": 1300, "embedding": 1300, "vision": 1300}


def test_an_estimate_prints_a_table_and_a_document_and_exports_nothing(pipeline):
    result = invoke("export", "--estimate", "--json")

    assert result.stdout == 'table\n{"total_bytes": 5}\n'
    assert len(pipeline) == 1


def test_an_export_error_is_one_sentence(monkeypatch):
    from autoglm_edge.export import pipeline as real

    def fail(*arguments, **options):
        raise ExportError("the disk is full;\nfree some")

    monkeypatch.setattr(real, "export", fail)

    result = invoke("export")

    assert result.exit_code == 1
    assert result.stderr.endswith("Error: the disk is full; free some\n")


def test_an_interrupted_export_says_how_to_go_on(monkeypatch):
    from autoglm_edge.export import pipeline as real

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(real, "export", interrupt)

    result = invoke("export", "zai-org/AutoGLM-Phone-9B")

    assert result.exit_code == 130
    assert "run the same command again" in result.stderr


def test_a_missing_extra_is_an_error_that_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("autoglm_edge.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("autoglm_edge.export", raising=False)
    for name in ("onnx_ir", "safetensors", "ml_dtypes", "onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)

    result = invoke("export")

    assert result.exit_code == 1
    assert 'pip install "autoglm-edge[export]"' in result.stderr


def test_autoglm_export_is_the_same_command_under_another_name(pipeline):
    command = cli.export_command()

    assert invoke("--fp16", command=command).exit_code == 0
    assert pipeline[0].precision == "fp16"
    assert [option.name for option in command.params if option.name != "version"] == [
        option.name for option in cli_export.export.params
    ]
    assert invoke("--version", command=command).output.startswith("autoglm-edge ")


@pytest.mark.parametrize(
    ("model", "recipe", "folder"),
    [
        (None, "int4", "pocket-int4"),
        ("zai-org/AutoGLM-Phone-9B", "int8", "AutoGLM-Phone-9B-int8"),
        ("org/name/", "mine/head only.toml", "name-head-only"),
        ("..", "int4", None),
    ],
)
def test_the_default_output_is_named_after_model_and_recipe(model, recipe, folder):
    expected = folder or f"{Path('..').resolve().name or 'model'}-int4"

    assert cli_export.default_output(model, recipe) == expected


# autoglm info


def test_info_shows_what_a_bundle_needs(bundle):
    result = invoke("info", bundle)

    assert result.exit_code == 0
    assert "6,144 tokens at most" in result.stdout
    assert "3,354 for 1080x2400" in result.stdout
    assert "335.5 MB for 4,096 tokens" in result.stdout
    assert "2.09 GB for 25,480 tokens" in result.stdout


def test_info_prints_the_manifest_as_a_document(bundle):
    document = json.loads(invoke("info", bundle, "--json", "--verify").stdout)

    assert document["geometry"]["layers"] == 40
    assert document["kv_bytes"] == {"4096": 335544320, "25480": 2087321600}
    assert document["image_tokens"]["720x1600"] == 1482
    assert document["verified"] is True


def test_verify_finds_a_flipped_bit(bundle):
    assert invoke("info", bundle, "--verify").exit_code == 0
    content = bytearray((bundle / "vision.onnx.data").read_bytes())
    content[7] ^= 1
    (bundle / "vision.onnx.data").write_bytes(content)

    assert invoke("info", bundle).exit_code == 0
    result = invoke("info", bundle, "--verify")
    assert result.exit_code == 1
    assert "vision.onnx.data" in result.stderr


# What all commands share


def test_the_version_is_printed():
    result = invoke("--version")

    assert result.exit_code == 0
    assert result.output.startswith("autoglm-edge 0.")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from autoglm_edge.cli import cli; cli.main(['run', '--help'], standalone_mode=False);"
        "bad = {'numpy', 'onnxruntime', 'PIL', 'onnx', 'torch', 'transformers'} & set(sys.modules);"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    code = "from autoglm_edge.cli import main; import sys; sys.argv = ['autoglm', 'run', '--help']; main()"
    reader, writer = os.pipe()
    os.close(reader)

    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)

    assert done.stderr == b""
    assert done.returncode == 1


def test_a_full_disk_is_one_sentence(bundle):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        run = subprocess.run(
            [sys.executable, "-m", "autoglm_edge", "info", str(bundle)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert run.returncode == 1
    assert run.stderr.strip() == "Error: a read or a write failed: No space left on device"


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", "?? é"), ("utf-8", "微信 é")])
def test_what_stdout_cannot_show_is_a_question_mark_but_documents_stay_whole(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)

    cli_common.tolerate_encodings()
    click.echo("微信 é")
    cli_common.print_json({"text": "微信"})
    stream.flush()

    first, second = stream.buffer.getvalue().decode(encoding).splitlines()
    assert first == shown
    assert json.loads(second) == {"text": "微信"}


def test_an_argument_is_utf8_whatever_the_locale_says():
    assert cli_common.as_unicode("打开") == "打开"
    assert cli_common.as_unicode(os.fsencode("打开").decode("ascii", "surrogateescape")) == "打开"
    assert cli_common.as_unicode("\udcff") == "\udcff"


def test_control_characters_of_an_answer_do_not_reach_a_terminal(engine, bundle, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    engine.answers = ["a\x1b]0;title\x07b\x9bc\nd\te"]

    cli.cli.main(["run", str(bundle), "hi"], standalone_mode=False)

    assert "a\ufffd]0;title\ufffdb\ufffdc\nd\te" in capsys.readouterr().out


def test_a_bar_is_drawn_on_a_terminal_and_ends_its_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    now = iter([0.0, 2.0, 2.01, 4.0])
    line = cli_common.ProgressLine(clock=lambda: next(now))

    for done in (0, 500, 501, 1000):
        line.show("Weights", done, 1000)
    line.close()

    drawn = capsys.readouterr().err.split("\r")
    assert len(drawn) == 4, "two states within a tenth of a second are drawn once"
    assert "50 %" in drawn[2]
    assert "0:02 left" in drawn[2]
    assert "100 %" in drawn[3]
    assert drawn[3].endswith("\n")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (512, "512 B"), (3600, "3.6 kB"), (7_150_000, "7.2 MB"), (5.864e9, "5.86 GB")],
)
def test_bytes_are_told_in_decimal_units(count, text):
    assert cli_common.format_bytes(count) == text


def test_an_error_that_is_a_bug_is_not_hidden(engine, bundle):
    engine.answers = [ZeroDivisionError("bug")]

    assert isinstance(invoke("run", bundle, "hi").exception, ZeroDivisionError)


# The real thing


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket") / "pocket-int4"
    result = invoke("export", "-o", folder, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["bundle"] == str(folder)
    return folder


@pytest.mark.slow
def test_the_pocket_model_is_exported_checked_and_asked(pocket, screen):
    assert invoke("info", pocket, "--verify").exit_code == 0

    result = invoke("run", pocket, "Open the settings", "-i", screen, "--max-tokens", 8, "--json")

    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert result.stdout.startswith(document["text"])
    assert 1 <= document["usage"]["completion_tokens"] <= 8
    assert 1 <= document["usage"]["image_tokens"] < document["usage"]["prompt_tokens"]
    assert document["timings"]["ttft_ms"] > 0
    assert document["image_size"] == [200, 400]


@pytest.mark.slow
def test_the_pocket_model_holds_a_conversation(pocket):
    result = invoke("run", pocket, "--chat", "--max-tokens", 4, input="Hello\nAgain\n")

    assert result.exit_code == 0, result.output
    counts = [int(line.split()[0]) for line in result.stderr.splitlines() if "prompt tokens" in line]
    assert len(counts) == 2
    assert counts[1] > counts[0]
