"""What all commands share, `autoglm info`, and the real thing once."""

import json
import os
import subprocess
import sys

import pytest
from cli_fixtures import invoke, replaced_engine, write_bundle, write_screen


@pytest.fixture
def engine(monkeypatch):
    yield from replaced_engine(monkeypatch)


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def screen(tmp_path):
    return write_screen(tmp_path / "screen.png")


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


def test_the_help_of_no_command_imports_anything_heavy():
    code = (
        "import sys, click; from autoglm_edge.cli import cli, export_command\n"
        "for name in cli.list_commands(click.Context(cli)):\n"
        "    cli.main([name, '--help'], standalone_mode=False)\n"
        "export_command().main(['--help'], standalone_mode=False)\n"
        "heavy = {'numpy', 'onnxruntime', 'PIL', 'onnx', 'torch', 'transformers', 'fastapi'}\n"
        "bad = heavy & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


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
