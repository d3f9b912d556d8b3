"""Runs: how they end, what is said about it, and that nothing of them stays behind, whatever happened.

The runtime's own child runs the pocket bundle, exported once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from parity_fixtures import prompt_file
from PIL import Image

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.limits.cgroup_v1 import CgroupV1
from autoglm_edge.android_sim.limits.enforcement import Enforcement, choose_enforcement, offered
from autoglm_edge.android_sim.limits.groups import PREFIX
from autoglm_edge.android_sim.limits.journal import journal_folder
from autoglm_edge.android_sim.limits.mechanism import clean_up
from autoglm_edge.android_sim.limits.mounts import hierarchies
from autoglm_edge.android_sim.run import runner
from autoglm_edge.android_sim.run.child import main as child_main
from autoglm_edge.android_sim.run.job import Job
from autoglm_edge.android_sim.run.runner import RunOptions, run_inside
from autoglm_edge.android_sim.trace import Trace
from autoglm_edge.errors import SimulationError

CHILDREN = Path(__file__).parent / "sim_children.py"
MIB = 1 << 20
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="runs are simulated on Linux")


def budget(limit_mib: int = 512, **others: Any) -> Budget:
    return Budget("test", "visible", limit_mib * MIB, **others)


def run(*words: object, kind: str = "auto", limit_mib: int = 512, **options: Any) -> Trace:
    given = budget(limit_mib)
    if kind != "auto" and (reason := offered(given)[kind]):
        pytest.skip(f"{kind}: {reason}")
    chosen = choose_enforcement(kind, given)  # type: ignore[arg-type]
    command = [sys.executable, "-I", "-S", str(CHILDREN), *map(str, words)]
    return run_inside(command, given, chosen, RunOptions(**{"timeout_s": 60.0, **options}))


def what_is_left() -> list[str]:
    """Groups of this process' runs, journals, and children that still run."""
    own = f"-{os.getpid()}-"
    groups = [
        str(path)
        for tree in hierarchies()
        for folder in tree.upwards()
        for path in folder.glob(f"{PREFIX}*")
        if own in path.name
    ]
    return groups + [str(path) for path in journal_folder().glob("*")] + running(CHILDREN)


def running(path: Path) -> list[str]:
    """Command lines with a file in them, of children of this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[1]
        except OSError:
            continue
        if str(path).encode() in words and parent in (b"1", str(os.getpid()).encode()):
            found.append(b" ".join(words).decode())
    return found


# --- how a run ends


@pytest.mark.parametrize("kind", ["auto", "none"])
def test_a_child_that_hangs_is_killed_at_the_timeout(kind: str) -> None:
    seen = run("hang", kind=kind, timeout_s=0.8)

    assert (seen.ending, seen.exit_code, seen.killed_by) == ("timeout", None, None)
    assert 0.8 <= seen.seconds < 20
    assert not seen.completed and seen.phases[-1].stop_s is None
    assert what_is_left() == []


def test_a_caller_can_stop_a_run() -> None:
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()

    command = [sys.executable, "-I", "-S", str(CHILDREN), "hang"]
    seen = run_inside(command, budget(), options=RunOptions(timeout_s=60), stop=stop)

    assert seen.ending == "interrupted"
    assert what_is_left() == []


def test_a_child_that_is_killed_from_outside_is_not_taken_for_one_above_its_limit() -> None:
    def kill() -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    words = (folder / "cmdline").read_bytes()
                    parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[1]
                except OSError:
                    continue
                if b"sim_children.py\0hang" in words and parent == str(os.getpid()).encode():
                    os.kill(int(folder.name), signal.SIGKILL)
                    return
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    seen = run("hang")
    killer.join()

    assert (seen.ending, seen.signal, seen.killed_by, seen.oom_kills) == ("killed", 9, "outside", 0)
    assert what_is_left() == []


@pytest.mark.parametrize(("number", "killed_by"), [(signal.SIGTERM, "outside"), (signal.SIGABRT, None)])
def test_a_crash_of_its_own_is_told_from_a_kill(number: int, killed_by: str | None) -> None:
    seen = run("signal", int(number))

    assert (seen.ending, seen.signal, seen.killed_by) == ("killed", number, killed_by)


def test_last_words_become_the_message_in_one_printable_line() -> None:
    seen = run("say", "first\nsecond\x1b[31m red", 3)

    assert (seen.ending, seen.exit_code) == ("exited", 3)
    assert seen.message == "first / second [31m red"
    assert not seen.alloc_failed
    assert run("say", "std::bad_alloc", 3).alloc_failed
    assert not run("say", "std::bad_alloc", 0).alloc_failed


def test_a_program_killed_below_a_shell_is_the_limits_work() -> None:
    seen = run("shell", 96, kind="cgroup_v1", limit_mib=64)

    assert (seen.ending, seen.exit_code, seen.oom_kills, seen.killed_by) == ("exited", 137, 1, "limit")


@pytest.mark.parametrize("kind", ["cgroup_v2", "cgroup_v1", "rlimit_data"])
def test_what_a_child_leaves_running_is_killed_too(kind: str) -> None:
    given = budget()
    if offered(given)[kind]:
        pytest.skip(offered(given)[kind])
    if kind == "rlimit_data" and not any(tree.is_v2 for tree in hierarchies()):
        pytest.skip("without a group nobody knows of a child in a session of its own")

    assert run("orphan", 30, kind=kind).completed
    assert what_is_left() == []


def test_phases_are_reported_and_lines_that_are_no_reports_do_no_harm() -> None:
    seen = run("phases")

    assert [phase.name for phase in seen.phases] == ["start", "load", "prefill", "decode"]
    assert [phase.stop_s for phase in seen.phases[:-1]] == [phase.start_s for phase in seen.phases[1:]]
    load, prefill = seen.phases[1], seen.phases[2]
    assert prefill.start_s - load.start_s == pytest.approx(0.1, abs=1e-6)
    assert seen.phases[-1].stop_s == seen.seconds
    assert seen.completed and seen.message == ""


def test_a_result_of_another_form_is_said_and_not_believed() -> None:
    seen = run("result", json.dumps({"tokens": 3}))

    assert seen.result is None
    assert "the child's result lacks the key" in seen.message


def test_samples_are_in_order_and_cost_is_reported() -> None:
    seen = run("anon", 32, 0.6, interval_s=0.02)

    moments = [sample.at_s for sample in seen.samples]
    assert len(moments) > 5 and moments == sorted(moments)
    assert 0 < seen.sampling_share < 1
    assert seen.interval_s == 0.02


# --- what cannot be run


@pytest.mark.parametrize(
    ("command", "word"),
    [([], "must be a program"), (["a\0b"], "must be a program"), (["/nonexistent/x"], "cannot be run")],
)
def test_a_command_that_cannot_be_run_is_refused(command: list[str], word: str) -> None:
    with pytest.raises(SimulationError, match=word):
        run_inside(command, budget())
    assert what_is_left() == []


@pytest.mark.parametrize(
    "options", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"interval_s": 0.001}, {"interval_s": 5}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(SimulationError):
        RunOptions(**options)  # type: ignore[arg-type]


def test_a_system_without_limits_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")

    with pytest.raises(SimulationError, match="predict without a run"):
        run_inside(["true"], budget())


def test_a_limit_too_small_to_begin_in_is_the_limits_verdict() -> None:
    seen = run("anon", 1, kind="cgroup_v1", limit_mib=2)

    assert (seen.ending, seen.killed_by) == ("killed", "limit")
    assert what_is_left() == []


# --- the child cannot lift its limits


def test_a_child_cannot_leave_its_group_or_write_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run("escape", kind="cgroup_v1", limit_mib=64)

    if any("could lift its own limits" in note for note in seen.enforced.notes):
        pytest.skip(seen.enforced.notes[-1])
    assert seen.exit_code == 0, seen.message

    # The same child gets out where the door is left open.
    way_in = CgroupV1.entry.fget
    assert way_in is not None
    monkeypatch.setattr(CgroupV1, "entry", property(lambda self: replace(way_in(self), sealed=False)))
    assert run("escape", kind="cgroup_v1", limit_mib=64).exit_code == 1


def test_a_child_cannot_raise_its_resource_limit() -> None:
    seen = run("raise-limit", kind="rlimit_data", limit_mib=64)

    assert seen.exit_code == 1 and "limit" in seen.message


# --- crashes of the runner


RUNNER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born without it
from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.limits.enforcement import choose_enforcement
from autoglm_edge.android_sim.run.runner import run_inside
given = Budget("test", "visible", 128 << 20)
run_inside([sys.executable, "-I", "-S", sys.argv[1], "hang"], given, choose_enforcement(sys.argv[2], given))
"""


def start_and_signal(kind: str, number: int) -> tuple[int, int, str]:
    """Run a runner, signal it while its child hangs; returns its status, its id, and the child's."""
    given = budget(128)
    if reason := offered(given)[kind]:
        pytest.skip(reason)
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(CHILDREN), kind],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    hanging = f"{CHILDREN}\0hang\0".encode()
    until = time.monotonic() + 60
    child = ""
    while not child and time.monotonic() < until:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "cmdline").read_bytes().endswith(hanging) and (
                    (folder / "stat").read_bytes().rpartition(b")")[2].split()[1] == str(process.pid).encode()
                ):
                    child = folder.name
            except OSError:
                continue
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(number)
    return process.wait(60), process.pid, child


def groups_of(pid: int) -> list[Path]:
    return [
        path
        for tree in hierarchies()
        for folder in tree.upwards()
        for path in folder.glob(f"{PREFIX}*-{pid}-*")
    ]


@pytest.mark.parametrize("kind", ["cgroup_v1", "cgroup_v2", "none"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_runner_that_is_interrupted_removes_everything(kind: str, number: int) -> None:
    status, pid, child = start_and_signal(kind, number)

    assert status != 0 and child
    assert not Path(f"/proc/{child}").exists()
    assert groups_of(pid) == []
    assert not list(journal_folder().glob("*"))


@pytest.mark.parametrize("kind", ["cgroup_v1", "cgroup_v2"])
def test_what_a_killed_runner_leaves_is_removed_by_the_next_one(kind: str) -> None:
    _, pid, child = start_and_signal(kind, signal.SIGKILL)
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.02)

    assert child and not Path(f"/proc/{child}").exists()  # it dies with its runner
    assert list(journal_folder().glob("*.json"))
    clean_up()
    assert groups_of(pid) == []
    assert not list(journal_folder().glob("*"))


def test_a_full_disk_is_said_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, pocket: Path) -> None:
    def full() -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)

    with pytest.raises(SimulationError, match="No space left on device"):
        run_inside(Job.ask(pocket, "hi"), budget())
    assert what_is_left() == []


def test_limits_that_cannot_be_made_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: Enforcement = choose_enforcement("watchdog", budget())
    monkeypatch.setattr(type(chosen), "make", lambda self: (_ for _ in ()).throw(SimulationError("refused")))

    with pytest.raises(SimulationError, match="refused"):
        run_inside(["true"], budget(), chosen)
    assert what_is_left() == []


# --- the runtime's own child


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autoglm_edge.embedded import pocket_path
    from autoglm_edge.export.pipeline import export

    folder = tmp_path_factory.mktemp("pocket") / "int4"
    export(pocket_path(), folder, precision="int4")
    return folder


@pytest.fixture(scope="module")
def screenshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("screen") / "screen.png"
    Image.new("RGB", (200, 400), "white").save(path)
    return path


def test_a_run_inside_ample_limits_is_the_answer_outside_of_them(pocket: Path, screenshot: Path) -> None:
    from autoglm_edge.runtime.engine import Engine

    job = Job.ask(pocket, "Open Settings", (screenshot,), max_tokens=12, threads=1, context=512)
    seen = run_inside(job, budget(1024))

    result = seen.result
    assert seen.completed and result is not None, seen
    assert [phase.name for phase in seen.phases] == ["start", "load", "image", "prefill", "decode", "done"]
    with Engine.load(pocket, threads=1, context=512) as engine:
        deltas = list(engine.chat(job.messages, max_tokens=12))
    last = deltas[-1]
    assert result.text == "".join(delta.text for delta in deltas)
    assert list(result.token_ids) == [token for delta in deltas for token in delta.token_ids]
    assert last.usage is not None
    assert (result.prompt_tokens, result.image_tokens) == (last.usage.prompt_tokens, last.usage.image_tokens)
    assert result.plan.threads == 1 and result.weights_bytes > 0 and result.parity is None
    assert seen.phase_seconds("image") == pytest.approx(result.image_s, abs=0.02)
    assert seen.phase_seconds("prefill") == pytest.approx(result.prefill_s, abs=0.02)
    assert seen.phase_seconds("load") == pytest.approx(result.load_s, abs=0.02)
    assert what_is_left() == []


def test_a_run_without_a_picture_has_no_phase_for_it(pocket: Path) -> None:
    seen = run_inside(Job.ask(pocket, "hi", max_tokens=4, context=256), budget(1024))

    assert [phase.name for phase in seen.phases] == ["start", "load", "prefill", "decode", "done"]
    assert seen.phase_seconds("decode") >= 0


def test_the_runtime_below_its_need_is_killed_in_a_phase(pocket: Path, screenshot: Path) -> None:
    given = budget(24)
    if reason := offered(given)["cgroup_v1"]:
        pytest.skip(reason)
    job = Job.ask(pocket, "Open Settings", (screenshot,), max_tokens=4)
    seen = run_inside(job, given, choose_enforcement("cgroup_v1", given))

    assert (seen.ending, seen.killed_by, seen.result) == ("killed", "limit", None)
    assert seen.last_phase in ("start", "load", "image")


def test_an_error_of_the_runtime_is_the_message(pocket: Path) -> None:
    seen = run_inside(Job.ask(pocket, "hi", context=1 << 30), budget(1024))

    assert (seen.ending, seen.exit_code) == ("exited", 1)
    assert seen.message.startswith("context is 1073741824")
    assert seen.result is None and not seen.alloc_failed


def test_a_reference_that_is_not_there_is_said(pocket: Path, tmp_path: Path) -> None:
    job = Job.ask(pocket, "hi", max_tokens=2, context=256, reference=tmp_path / "missing.safetensors")
    seen = run_inside(job, budget(1024))

    assert seen.exit_code == 1 and "there is no reference at" in seen.message
    assert seen.last_phase == "score"


@pytest.mark.slow
def test_parity_inside_the_limits_is_that_of_a_validation(pocket: Path, tmp_path: Path) -> None:
    from autoglm_edge.embedded import pocket_path
    from autoglm_edge.parity.record import record
    from autoglm_edge.parity.validate import validate

    reference = tmp_path / "ref.safetensors"
    record(str(pocket_path()), reference, prompts=str(prompt_file(tmp_path)))
    # Inside the limits of a phone graphs read prompts, whatever this machine has.
    whole = validate(pocket, reference, threads=1, prefill="decoder").candidate
    assert whole is not None

    asked = Job.ask(pocket, "hi", max_tokens=2, threads=1, prefill="decoder", reference=reference)
    seen = run_inside(asked, budget(1024))

    assert seen.result is not None and seen.result.parity is not None, seen
    parity = seen.result.parity
    assert parity.kl_mean == pytest.approx(whole.answer.kl.mean, rel=1e-6)
    assert parity.top1_agreement == whole.answer.top1.value
    assert parity.positions == whole.answer.top1.total and parity.cases == whole.cases == 4
    assert parity.same_answers == whole.same_answers.hits and parity.faults == ()
    assert [phase.name for phase in seen.phases][-2:] == ["score", "done"]

    one = Job.ask(pocket, "hi", max_tokens=2, threads=1, reference=reference, cases=("text-zh-0",))
    some = run_inside(one, budget(1024)).result
    assert some is not None and some.parity is not None and some.parity.cases == 1
    unknown = run_inside(replace(one, cases=("nobody",)), budget(1024))
    assert "has no case 'nobody'" in unknown.message


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 0},
        {"max_tokens": True},
        {"context": 0},
        {"threads": -1},
        {"weights": "mine"},
        {"prefill": ""},
        {"messages": ()},
        {"messages": ({"role": "user", "content": [{"type": "image", "image": b"bytes"}]},)},
        {"cases": ("a", 1)},
        {"seed": -1},
        {"temperature": float("nan")},
        {"image_layout": "wide"},
        {"reference": "name"},
    ],
)
def test_a_job_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SimulationError):
        Job(**{"bundle": Path("x"), "messages": ({"role": "user", "content": "hi"},), **change})


def test_a_job_survives_its_way_to_the_child() -> None:
    job = Job.ask(Path("out"), "你好", (Path("a.png"),), reference=Path("r"), cases=("x",), seed=3)

    assert Job.from_json(job.to_json()) == job
    assert job.image_count == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"bundle": "x"}', "[" * 100_000])
def test_a_job_of_another_form_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.json"
    path.write_text(text)

    assert child_main([str(path)]) == 1
    assert "job" in capsys.readouterr().err
    assert child_main([]) == child_main([str(tmp_path / "missing")]) == 1


def test_only_the_main_thread_changes_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Callable[..., Any] | int | None] = []

    def inside() -> None:
        with runner._signals_raise():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    inside()

    assert seen[0] == signal.SIG_DFL
    assert callable(seen[1]) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
