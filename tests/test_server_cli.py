"""`autoglm serve` as a process: what it refuses to start with, what it says, how signals end it."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from autoglm_edge.commands.serve import serve
from autoglm_edge.embedded import pocket_path

HI = {"messages": [{"role": "user", "content": "Hi there, secret-word " * 20}], "max_tokens": 3}


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(pocket_path(), "int8")


def refused(*arguments: Any, **environment: str) -> str:
    """What is said of options that cannot be."""
    result = CliRunner(env={"AUTOGLM_API_KEY": "", **environment}).invoke(serve, [*map(str, arguments)])
    assert result.exit_code in (1, 2), result.output
    return result.stderr


@contextmanager
def served(bundle: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process and its address."""
    code = "from autoglm_edge.commands.serve import serve; serve.main(prog_name='autoglm serve')"
    command = [sys.executable, "-c", code, str(bundle), "--port", "0", "--threads", "1", *arguments]
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.search(r"at (http://\S+), loading", first)
        assert found, first
        for _ in range(600):
            try:
                if httpx.get(f"{found[1]}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def test_a_network_is_not_served_without_a_key(bundle: Path, tmp_path: Path) -> None:
    assert "--insecure" in refused(bundle, "--host", "0.0.0.0")
    assert "at least 8" in refused(bundle, "--host", "0.0.0.0", "--api-key", "short")
    assert "at least 8" in refused(bundle, AUTOGLM_API_KEY="short")
    assert "cannot be read" in refused(bundle, "--api-key-file", tmp_path / "nothing")
    assert "every web page" in refused(bundle, "--allow-origin", "*")


def test_what_makes_no_sense_is_said_before_anything_is_loaded(bundle: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "number of bytes" in refused(bundle, "--cache-bytes", "much")
    assert "--no-reuse" in refused(bundle, "--no-reuse", "--cache-dir", tmp_path)
    assert "--cache-dir" in refused(bundle, "--cache-dir-bytes", "1GB")
    assert "no host" in refused(bundle, "--allow-image-urls", "http://x/")
    assert "203.0.113.7" in refused(bundle, "--host", "203.0.113.7", "--insecure")
    assert "0<x" in refused(bundle, "--grace", "0").replace("x>0", "0<x")


def test_an_engine_that_cannot_be_loaded_is_one_sentence_and_status_1(bundle: Path) -> None:
    result = CliRunner().invoke(serve, [str(bundle), "--port", "0", "--context", "999999"])

    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: context is 999999")


def test_a_server_answers_and_writes_a_line_without_contents(bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-long-key\n")
    options = ("--api-key-file", str(keys), "--cache-dir", str(tmp_path / "kv"), "--cache-bytes", "1MB")
    with served(bundle, *options, "--served-model-name", "mine") as (process, url):
        client = httpx.Client(base_url=url, trust_env=False, headers={"authorization": "Bearer a-long-key"})
        with client:
            answer = client.post("/v1/chat/completions?q=query-word", json=HI | {"model": "mine"})
            assert answer.status_code == 200
            assert client.post("/v1/chat/completions", json=HI | {"model": "other"}).status_code == 404
            assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401

        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)

    assert process.returncode == 0
    assert re.search(r"POST /v1/chat/completions 200 [\d.]+s prompt=\d+ cached=0 answer=3 id=req-", said)
    assert " 401 " in said
    for word in ("secret-word", "query-word", "a-long-key"):
        assert word not in said
    assert list((tmp_path / "kv").rglob("*")), "nothing was kept in --cache-dir"


def test_ctrl_c_lets_the_answer_under_way_end(bundle: Path) -> None:
    with served(bundle, "--no-access-log") as (process, url):
        bias = {
            str(token): -100
            for token in json.loads((pocket_path() / "config.json").read_text())["eos_token_id"]
        }
        body = HI | {"stream": True, "max_tokens": 200, "logit_bias": bias}
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=60
        ) as response:
            pieces = response.iter_raw()
            while b"data:" not in next(pieces):
                pass
            process.send_signal(signal.SIGINT)
            rest = b"".join(pieces)
        _, said = process.communicate(timeout=60)

    assert rest.endswith(b"data: [DONE]\n\n")
    assert process.returncode == 130
    assert "stopping" in said
    assert "POST" not in said


def test_the_front_door_of_the_script_is_the_command() -> None:
    script = (Path(__file__).parent.parent / "scripts" / "run_autoglm_server.sh").read_text()

    assert 'serve "$BUNDLE" --port 8000 "$@"' in script
    assert "exec " in script


def test_the_tables_of_the_page_are_what_the_code_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "make_server_docs.py"))

    assert script["main"](["--check"]) == 0, "run python scripts/make_server_docs.py"
    stale = tmp_path / "server.md"
    stale.write_text(script["PAGE"].read_text("utf-8").replace("--grace", "--grade"), "utf-8")
    monkeypatch.setitem(script["main"].__globals__, "PAGE", stale)
    assert script["main"](["--check"]) == 1
    assert "make_server_docs.py" in capsys.readouterr().err
