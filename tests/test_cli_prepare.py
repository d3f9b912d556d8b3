"""`autoglm prepare`, and what `autoglm info` says of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autoglm_edge.commands.info import info
from autoglm_edge.commands.prepare import prepare
from autoglm_edge.runtime import plan as plan_module
from autoglm_edge.runtime.machine import prepared
from autoglm_edge.runtime.machine.integers import Integers


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(checkpoint_of("tiny"), "int4", prefill="int8")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(prepare, [str(argument) for argument in arguments])


def test_preparing_shows_its_state_and_removing_ends_it(bundle: Path) -> None:
    before = json.loads(call(bundle, "--status", "--json").stdout)
    made = json.loads(call(bundle, "--json").stdout)
    after = json.loads(call(bundle, "--status", "--json").stdout)
    removed = json.loads(call(bundle, "--remove", "--json").stdout)

    assert [part["ready"] for part in before["parts"].values()] == [False, False]
    assert before["parts"]["decoder"]["reason"] == "not prepared yet"
    assert list(made["parts"]) == ["decoder", "vision"]
    assert made["parts"] == after["parts"]
    assert [part["ready"] for part in after["parts"].values()] == [True, True]
    assert made["seconds"] > 0
    assert removed["removed_bytes"] == sum(part["bytes"] for part in after["parts"].values()) > 0
    assert removed["parts"] == before["parts"]


def test_progress_goes_to_stderr_and_the_state_to_stdout(bundle: Path) -> None:
    result = call(bundle)

    assert result.exit_code == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["decoder", "prepared,"],
        ["vision", "prepared,"],
    ]
    assert "Removed" in call(bundle, "--remove").stdout


def test_a_full_disk_fails_the_command_with_a_sentence(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = prepared.shutil.disk_usage("/")._replace(free=1)
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda path: usage)
    result = call(bundle)

    assert result.exit_code == 1
    assert "Error: no prepared weights for decoder" in result.stderr
    assert "Traceback" not in result.output


def test_status_and_removal_exclude_each_other(bundle: Path) -> None:
    assert call(bundle, "--remove", "--status").exit_code == 2
    assert call(bundle / "absent").exit_code == 1


def test_info_shows_how_the_bundle_would_run_here_without_loading_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("a graph was loaded")

    monkeypatch.setattr("autoglm_edge.runtime.session.open_session", load)
    result = CliRunner().invoke(info, [str(bundle), "--json"])
    document = json.loads(result.stdout)

    assert document["plan"]["weights"] == "packed"
    assert document["plan"]["prefill"] in ("native", "integer", "decoder")
    assert document["plan"]["threads"] >= 1
    assert document["prepared"]["decoder"]["ready"] is False
    assert document["parts"]["prefill"]["integer"] is True
    text = CliRunner().invoke(info, [str(bundle)]).stdout
    assert "prefill " in text
    assert "8-bit integers" in text
    assert "weights packed" in text
    assert "not prepared yet" in text


def test_info_tells_the_tokens_of_a_screenshot_for_each_budget(bundle: Path) -> None:
    document = json.loads(CliRunner().invoke(info, [str(bundle), "--json"]).stdout)
    budgets = {int(budget): tokens for budget, tokens in document["image_budgets"].items()}

    assert max(budgets) == document["image_tokens"]["most"]
    assert all(0 < tokens <= budget for budget, tokens in budgets.items())


def test_info_of_a_bundle_that_cannot_run_here_says_so_and_shows_it(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "integers", lambda: Integers(False, True, ""))
    bundle = bundle_of(checkpoint_of("tiny"), "int8")
    result = CliRunner().invoke(info, [str(bundle), "--json"])
    document = json.loads(result.stdout)

    assert result.exit_code == 0
    assert document["plan"] is None
    assert "int8-blocks" in document["plan_error"]
    assert "cut off" in CliRunner().invoke(info, [str(bundle)]).stdout
