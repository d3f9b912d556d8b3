"""`autoglm simulate`: what it prints, what it writes, and when it fails."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from simulated_traces import trace, whole_run

from autoglm_edge.android_sim import simulate as module
from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.limits.enforcement import offered
from autoglm_edge.android_sim.run.job import Job
from autoglm_edge.android_sim.run.runner import RunOptions
from autoglm_edge.android_sim.simulate import Ask, plan, simulate, simulate_all
from autoglm_edge.android_sim.trace import Trace
from autoglm_edge.commands.simulate import simulate as command
from autoglm_edge.embedded import pocket_path, sample_screenshot
from autoglm_edge.errors import SimulationError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.engine import Engine

SMALL = """
id = "small"
kind = "edge"
[figures]
mem_total = 2000
mem_visible = {}
dram_peak = 10
storage_read = 500
"""


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(pocket_path(), "int4")


@pytest.fixture
def device(tmp_path: Path) -> Callable[[float], Path]:
    def write(limit_mib: float) -> Path:
        path = tmp_path / f"small-{limit_mib:g}.toml"
        path.write_text(SMALL.format(limit_mib))
        return path

    return write


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Job, Budget, RunOptions]]:
    """The runner, replaced by one that notes what it is asked and gives a made-up trace."""
    asked: list[tuple[Job, Budget, RunOptions]] = []

    def fake(
        job: Job, budget: Budget, enforcement: object, options: RunOptions, *, stop: object = None
    ) -> Trace:
        asked.append((job, budget, options))
        limit = budget.limit_bytes / 1e6
        return whole_run(limit) if limit > 700 else whole_run(limit, killed_at=6.1)

    monkeypatch.setattr(module, "run_inside", fake)
    return asked


def call(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def last(result: Result) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return document


def test_a_run_that_fits_prints_its_verdict_and_ends_well(bundle: Path, runs: list[Any]) -> None:
    result = call(bundle, "--device", "sd8g3-16", "--json")
    assert result.exit_code == 0
    assert "FITS" in result.stdout
    assert last(result)["device"] == "sd8g3-16"
    job, budget, _ = runs[0]
    assert job.image_count == 1
    assert budget.limit_bytes == last(result)["limit_bytes"]


def test_a_killed_run_ends_with_status_1_after_its_report(bundle: Path, runs: list[Any], device: Any) -> None:
    result = call(bundle, "--device", device(300), "--json")
    assert result.exit_code == 1
    assert last(result)["verdict"] == "killed_oom"
    assert len(runs) == 1


def test_state_question_and_options_reach_the_run(bundle: Path, runs: list[Any]) -> None:
    reference = sample_screenshot()  # any file: the runner is not real here
    call(
        *(
            bundle,
            "--device",
            "phone-16",
            "--state",
            "service",
            "--prompt",
            "打开",
            "-i",
            sample_screenshot(),
        ),
        *(
            "-i",
            sample_screenshot(),
            "--max-tokens",
            "7",
            "--context",
            "2048",
            "--timeout",
            "33",
            "--throttle",
        ),
        *("--weights", "packed", "--prompts", "decoder", "--reference", reference, "--case", "a"),
    )
    job, budget, options = runs[0]
    assert budget.state == "service"
    assert (job.image_count, job.max_tokens, job.context) == (2, 7, 2048)
    assert (job.weights, job.prefill, job.reference, job.cases) == ("packed", "decoder", reference, ("a",))
    assert job.messages[-1]["content"][-1]["text"] == "打开"
    assert (options.timeout_s, options.throttle_cpu, options.throttle_storage) == (33, True, True)


def test_all_devices_end_in_a_matrix_and_one_document(bundle: Path, runs: list[Any]) -> None:
    result = call(bundle, "--all", "--no-image", "--json")
    assert len(runs) == 20
    assert all(job.image_count == 0 for job, _, _ in runs)
    assert len(last(result)["runs"]) == 20
    rows = [
        line
        for line in result.stdout.splitlines()
        if re.match(r"(phone|sd|d9|tensor|rpi|orin|rk|n1|lap)", line)
    ]
    assert len(rows) == 20


def test_several_bundles_are_columns(bundle: Path, runs: list[Any]) -> None:
    result = call(bundle, bundle, "--device", "phone-16")
    assert len(runs) == 2
    assert "device" in result.stdout


def test_a_picture_and_a_page_are_written(bundle: Path, runs: list[Any], tmp_path: Path) -> None:
    plot, page = tmp_path / "t.png", tmp_path / "t.html"
    assert call(bundle, "--device", "phone-16", "--plot", plot, "--html", page).exit_code == 0
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert page.read_text().startswith("<!doctype html>")
    failed = call(bundle, "--device", "phone-16", "--html", tmp_path / "none" / "t.html")
    assert failed.exit_code == 1
    assert "cannot be written" in failed.stderr


def test_a_plan_runs_nothing_and_counts_the_question_that_is_asked(bundle: Path, runs: list[Any]) -> None:
    result = call(bundle, "--device", "phone-6", "--plan", "--json")
    own = call(bundle, "--device", "phone-6", "--plan", "--prompt", "hi", "--no-image", "--json")
    assert runs == []
    assert result.exit_code == own.exit_code == 0
    assert last(result)["measured"] is False
    assert last(result)["forecast_question"]["image_tokens"] > 0
    with Engine.load(bundle) as engine:
        counted = len(engine.tokenize([{"role": "user", "content": [{"type": "text", "text": "hi"}]}]))
    assert last(own)["forecast_question"]["prompt_tokens"] == counted


def test_a_plan_for_a_device_that_is_too_small_ends_with_status_1(bundle: Path, device: Any) -> None:
    result = call(bundle, "--device", device(40), "--plan", "--json")
    assert result.exit_code == 1
    assert last(result)["verdict"] == "killed"


def test_devices_are_listed_with_where_their_figures_come_from(bundle: Path) -> None:
    result = call("--list-devices", "--json")
    assert result.exit_code == 0
    assert "sd8g3-16" in result.stdout
    figures = {item["id"]: item["figures"] for item in last(result)["devices"]}
    assert figures["sd8g3-16"]["dram_peak"]["basis"] == "derived"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "name the folder of a bundle"),
        (("OUT", "--all", "--device", "phone-8"), "exclude each other"),
        (("OUT", "--image", "x.png", "--no-image"), "exclude each other"),
        (("OUT", "--plan", "--plot", "x.png"), "runs nothing"),
        (("OUT", "--plan", "--html", "x.html"), "runs nothing"),
        (("OUT", "--plan", "--reference", "x"), "runs nothing"),
        (("OUT", "--case", "a"), "which is missing"),
        (("OUT", "OUT", "--plot", "x.png"), "draws one run"),
        (("OUT", "--arm64", "--all"), "check of its own"),
        (("OUT", "--arm64-cpu", "cortex-a76"), "is for --arm64"),
        (("OUT", "--state", "frozen"), "is not one of"),
        (("OUT", "--timeout", "0"), "is not in the range"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments: tuple[str, ...], reason: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())


def test_a_device_or_a_bundle_that_is_not_there_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    for arguments, reason in (
        ((bundle, "--device", "iphone"), "there is no device 'iphone'"),
        ((bundle, "--device", tmp_path / "x.toml"), "cannot be read"),
        ((tmp_path / "none",), "does not exist"),
        ((bundle, "-i", tmp_path / "none.png"), "is no file"),
    ):
        result = call(*arguments)
        assert result.exit_code == 1
        assert reason in result.stderr
        assert "Traceback" not in result.output


def test_the_arm_check_is_called_and_decides_the_status(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoglm_edge.android_sim.arm64 import check

    @dataclasses.dataclass(frozen=True)
    class Report:
        passed: bool

        def to_table(self) -> str:
            return "the table"

        def to_json(self) -> str:
            return json.dumps({"passed": self.passed})

    asked: list[Any] = []

    def fake(folder: Path, cpus: Any, tell: Any, *, question: Any) -> Report:
        asked.append((folder, tuple(cpus), question.text))
        assert [path.suffix for path in question.images] == [".png"]
        return Report("a72" not in str(cpus))

    monkeypatch.setattr(check, "check_arm64", fake)
    good = call(bundle, "--arm64", "--arm64-cpu", "cortex-a76", "--prompt", "hi", "--json")
    bad = call(bundle, "--arm64")
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert last(good) == {"passed": True}
    assert "the table" in bad.stdout
    assert asked[0][1:] == (("cortex-a76",), "hi")
    assert len(asked[1][1]) == 3


def test_the_question_is_put_together_as_the_engine_does(bundle: Path) -> None:
    ask = Ask(images=(sample_screenshot(),), system="be brief")
    question = ask.question(Bundle.open(bundle))
    with Engine.load(bundle) as engine:
        prompt = engine.prompt(ask.messages)
    assert question.prompt_tokens == len(prompt.ids)
    assert question.image_tokens == prompt.image_tokens
    fewer = dataclasses.replace(ask, max_image_tokens=40).question(Bundle.open(bundle))
    assert fewer.image_tokens <= 40


def test_every_pair_of_bundle_and_device_is_run_in_order() -> None:
    seen: list[tuple[str, str]] = []

    def run(bundle: Any, device: Any) -> Any:
        seen.append((str(bundle), device.id))
        return None

    list(simulate_all(["a", "b"], ["phone-4", "phone-8"], run=run))
    assert seen == [("a", "phone-4"), ("b", "phone-4"), ("a", "phone-8"), ("b", "phone-8")]


def test_a_plan_that_differs_from_the_run_is_said(bundle: Path, runs: list[Any]) -> None:
    found = simulate(bundle, "phone-16")
    assert any("the forecast took weights to be packed" in note for note in found.notes)
    with pytest.raises(SimulationError, match="must be one of"):
        simulate(bundle, "phone-16", state="frozen")  # type: ignore[arg-type]
    assert plan(bundle, "phone-16").forecast.expected == "fits"
    assert not runs[1:]
    assert trace([], []).completed


def limits() -> bool:
    """Whether this host has a mechanism that really limits."""
    reasons = offered(Budget("x", "visible", 256 << 20))
    return any(not reasons[name] for name in ("cgroup_v2", "cgroup_v1"))


@pytest.mark.slow
@pytest.mark.skipif(not limits(), reason="no control group can be made here")
def test_the_pocket_lives_where_it_has_room_and_dies_where_it_has_none(bundle: Path, device: Any) -> None:
    roomy = call(bundle, "--device", device(220), "--max-tokens", "4", "--json")
    tight = call(bundle, "--device", device(48), "--max-tokens", "4", "--json")
    found, killed = last(roomy), last(tight)
    assert (roomy.exit_code, found["verdict"]) == (0, "fits")
    assert (tight.exit_code, killed["verdict"]) == (1, "killed_oom")
    assert killed["phase"] in ("start", "load", "image", "prefill")
    assert found["answer"]["tokens"] == 4
    peak = next(item for item in found["forecast_errors"] if item["phase"] == "peak")
    assert abs(peak["error"]) < 0.35
