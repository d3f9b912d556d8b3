"""`autoglm bench`: options, usage, the last line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autoglm_edge.commands.bench import bench
from autoglm_edge.measure import speed
from autoglm_edge.measure.bandwidth import Limits


@pytest.fixture(scope="module")
def folder(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(checkpoint_of("tiny", dtype="float32"), "int4")


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_limits", lambda threads: Limits(threads, 1e10, 1e11, 4e11))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(bench, [str(item) for item in arguments])


def test_a_quick_bench_ends_with_one_document(folder: Path) -> None:
    result = call(folder, "--quick", "--prefill", "9,20", "--images", "", "--threads", 1, "--json")

    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert [row["tokens"] for row in document["prefill"]] == [9, 20]
    assert [row["context"] for row in document["decode"]] == [0]
    assert document["images"] == []
    assert document["threads"] == document["limits"]["threads"] == 1
    assert "prefill 20" in result.stdout
    assert "loading" in result.stderr
    assert "loading" not in result.stdout


def test_default_sizes_that_are_too_large_are_left_out_and_said_so(folder: Path) -> None:
    result = call(folder, "--decode-at", "", "--prefill", "4", "--repeat", 1, "--steps", 2, "--json")

    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert len(document["images"]) >= 1
    assert document["left_out"]
    assert all("the bundle allows" in reason for reason in document["left_out"])
    assert "left out" in result.stdout


def test_a_size_that_was_asked_for_and_is_too_large_is_an_error(folder: Path) -> None:
    result = call(folder, "--prefill", "128,999999", "--quick")

    assert result.exit_code == 1
    assert "999999" in result.stderr
    assert "name smaller sizes" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prefill", "many"),
        ("--prefill", "1,,2"),
        ("--prefill", "0"),
        ("--prefill", "8,8"),
        ("--decode-at", "-1"),
        ("--images", "1.5"),
        ("--repeat", "0"),
        ("--threads", "0"),
        ("--prefill", "", "--decode-at", "", "--images", "", "--together", ""),
        ("--together", "1"),
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_measured(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    result = call(folder, *arguments)

    assert result.exit_code == 2, result.output
    assert "loading" not in result.stderr


def test_a_folder_that_is_no_bundle_is_one_sentence(tmp_path: Path) -> None:
    result = call(tmp_path / "nowhere")

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
