"""Options of `autoglm run` that say what is kept, on a tiny bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoglm_edge import cli


@pytest.fixture(scope="module")
def bundle(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(checkpoint_of("tiny"), "fp32")


def run(*arguments: Any, **options: Any) -> Any:
    return CliRunner().invoke(cli.cli, ["run", *map(str, arguments)], prog_name="autoglm", **options)


def document(*arguments: Any) -> dict[str, Any]:
    result = run(*arguments, "--max-tokens", 8, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_a_folder_makes_the_second_start_a_warm_one(bundle: Path, tmp_path: Path) -> None:
    ask = (bundle, "hi", "--system", "operate the phone " * 10, "--prefix-cache", tmp_path / "kv")

    first, second = document(*ask), document(*ask)

    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] >= second["usage"]["prompt_tokens"] - 16
    assert second["timings"]["reused_tokens"] == second["usage"]["cached_tokens"]
    assert second["text"] == first["text"]


def test_the_document_says_how_the_answer_came_about(bundle: Path) -> None:
    found = document(bundle, "hi", "--no-lookup")

    assert found["plan"]["prefill"] == "decoder"
    assert found["plan"]["weights"] == "packed"
    assert found["timings"]["drafted_tokens"] == 0
    assert found["timings"]["decoder_runs"] == found["usage"]["completion_tokens"] - 1


def test_a_conversation_reuses_what_was_said_unless_told_not_to(bundle: Path) -> None:
    lines = "what is on the screen, and what comes next?\nand then?\n"
    arguments = (bundle, "--chat", "--max-tokens", 4)

    assert " reused)" in run(*arguments, input=lines).stderr
    assert " reused)" not in run(*arguments, "--no-reuse", input=lines).stderr


def test_a_folder_for_what_is_not_kept_is_wrong_usage(bundle: Path, tmp_path: Path) -> None:
    result = run(bundle, "hi", "--no-reuse", "--prefix-cache", tmp_path)

    assert result.exit_code == 2
    assert "--no-reuse keeps nothing; leave it out, or --prefix-cache" in result.stderr


def test_a_file_in_place_of_the_folder_is_wrong_usage(bundle: Path) -> None:
    assert run(bundle, "hi", "--prefix-cache", __file__).exit_code == 2
