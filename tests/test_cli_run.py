"""`autoglm run`: what reaches the engine, what is said of its answer, and what is refused before."""

import json
import signal
import sys

import pytest
from cli_fixtures import TAP, invoke, replaced_engine, write_bundle, write_screen
from PIL import Image

from autoglm_edge import cli
from autoglm_edge.errors import ContextLengthError


@pytest.fixture
def engine(monkeypatch):
    yield from replaced_engine(monkeypatch)


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def screen(tmp_path):
    return write_screen(tmp_path / "screen.png")


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


def test_control_characters_of_an_answer_do_not_reach_a_terminal(engine, bundle, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    engine.answers = ["a\x1b]0;title\x07b\x9bc\nd\te"]

    cli.cli.main(["run", str(bundle), "hi"], standalone_mode=False)

    assert "a\ufffd]0;title\ufffdb\ufffdc\nd\te" in capsys.readouterr().out


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
