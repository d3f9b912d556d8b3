"""The truth table: children whose need is known, under limits below and above it, by every mechanism offered.

Sizes are 48 to 160 MiB, so that a cell takes a second or two.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import get_args

import pytest

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.limits.enforcement import Wish, choose_enforcement, offered
from autoglm_edge.android_sim.limits.zram import why_not
from autoglm_edge.android_sim.run.job import Job
from autoglm_edge.android_sim.run.runner import RunOptions, run_inside
from autoglm_edge.android_sim.trace import Trace
from autoglm_edge.android_sim.verdict import classify
from autoglm_edge.embedded import pocket_path, sample_screenshot
from autoglm_edge.export.pipeline import export

CHILDREN = Path(__file__).parent / "sim_children.py"
MIB = 1 << 20
KINDS = [kind for kind in get_args(Wish) if kind != "auto"]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are made on Linux")


def budget(limit_mib: int, swap_mib: int = 0) -> Budget:
    # Pressure on a busy machine says nothing about these children: the line is above what one can have.
    return Budget("test", "visible", limit_mib * MIB, swap_mib * MIB, psi_some_ms_per_s=1000)


def run(
    kind: str, given: Budget, *words: object, cold: tuple[Path, ...] = (), timeout_s: float = 60.0
) -> Trace:
    if reason := offered(given)[kind]:
        pytest.skip(f"{kind}: {reason}")
    command = [sys.executable, "-I", "-S", str(CHILDREN), *map(str, words)]
    options = RunOptions(timeout_s=timeout_s, interval_s=0.02, cold=cold)
    return run_inside(command, given, choose_enforcement(kind, given), options)  # type: ignore[arg-type]


# What holds, what is seen, what is refused: the verdict on too much memory by mechanism.
TOO_MUCH = {
    "anon": {
        "cgroup_v2": "killed_oom",
        "cgroup_v1": "killed_oom",
        "rlimit_data": "alloc_failed",
        "watchdog": "killed_limiter",
        "none": "exceeded",
    },
    "shared": {
        "cgroup_v2": "killed_oom",
        "cgroup_v1": "killed_oom",
        "rlimit_data": "killed_limiter",  # shared memory is seen, but not refused
        "watchdog": "killed_limiter",
        "none": "exceeded",
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["anon", "shared"])
def test_memory_above_the_limit_is_not_had(kind: str, verb: str) -> None:
    given = budget(64)
    seen = run(kind, given, verb, 96)

    assert classify(seen, given).name == TOO_MUCH[verb][kind], seen
    if kind.startswith("cgroup"):
        assert (seen.ending, seen.signal, seen.oom_kills, seen.killed_by) == ("killed", 9, 1, "limit")
        assert seen.peak_held().bytes <= 64 * MIB
    if kind == "rlimit_data" and verb == "anon":
        assert seen.alloc_failed and seen.oom_kills == 0 and "allocate memory" in seen.message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["anon", "shared"])
def test_memory_below_the_limit_fits(kind: str, verb: str) -> None:
    given = budget(96)
    seen = run(kind, given, verb, 64)

    assert seen.completed and seen.oom_kills == 0 and seen.killed_by is None
    if seen.peak_swap().bytes and not seen.enforced.swap_bytes:
        pytest.skip("this host swaps by itself, without need")
    assert classify(seen, given).name == "fits", seen
    assert 60 * MIB < seen.peak_held().bytes < 96 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_that_grows_is_caught_on_the_way(kind: str) -> None:
    given = budget(48)
    seen = run(kind, given, "grow", 72, 0.7)

    name = classify(seen, given).name
    # Under RLIMIT_DATA the child asks for all of it at once, and grows into what it has.
    assert name == TOO_MUCH["anon"][kind], seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapped_file_above_the_limit_is_read_again_and_again(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(96 * MIB))
    given = budget(48)
    seen = run(kind, given, "file", file, 4, cold=(file,))

    name = classify(seen, given, weights_bytes=96 * MIB, tokens=4).name
    if kind.startswith("cgroup"):
        assert name == "fits_thrash", seen
        assert seen.completed
        assert (seen.change("refaulted_bytes") or 0) > 48 * MIB
        assert seen.peak_file().bytes <= 64 * MIB
    else:
        assert name == "exceeded", seen  # the host cannot hold it to what the device would
        assert any(
            "mapped files are not limited" in note or "not limited" in note for note in seen.enforced.notes
        )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("cgroup")])
def test_a_mapped_file_below_the_limit_is_read_once(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(64 * MIB))
    given = budget(128)
    seen = run(kind, given, "file", file, 4, cold=(file,))

    assert classify(seen, given, weights_bytes=64 * MIB, tokens=4).name == "fits", seen
    assert seen.peak_file().bytes > 60 * MIB
    assert seen.peak_charged_bytes is not None and seen.peak_charged_bytes > 60 * MIB


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("cgroup")])
def test_a_file_that_was_read_before_costs_as_much_as_one_that_was_not(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(64 * MIB))
    assert len(file.read_bytes()) == 64 * MIB  # warm, and charged to this process
    seen = run(kind, budget(128), "file", file, 1, cold=(file,))

    assert (seen.change("read_bytes") or 0) > 60 * MIB
    assert seen.peak_charged_bytes is not None and seen.peak_charged_bytes > 60 * MIB


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("cgroup")])
def test_swap_is_had_where_it_is_real(kind: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    given = budget(64, swap_mib=64)
    seen = run(kind, given, "anon", 80, 1)
    if not seen.enforced.swap_bytes:
        pytest.skip("; ".join(seen.enforced.notes))

    assert seen.completed and seen.peak_swap().bytes > 8 * MIB
    assert classify(seen, given).name in ("fits_swap", "fits_thrash")
    assert seen.peak_held().bytes > 76 * MIB

    more = run(kind, given, "anon", 160, 1)
    assert classify(more, given).name == "killed_oom"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("cgroup")])
def test_memory_of_a_childs_child_counts(kind: str) -> None:
    given = budget(64)
    seen = run(kind, given, "parent", 96)

    assert classify(seen, given).name == "killed_oom", seen
    assert seen.oom_kills == 1


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pocket") / "int4"
    export(pocket_path(), folder, precision="int4")
    return folder


# A context is asked for as a whole: RLIMIT_DATA counts that, the others what is touched.
NOT_ENOUGH = {
    "cgroup_v2": (32, "killed_oom"),
    "cgroup_v1": (32, "killed_oom"),
    "rlimit_data": (150, "alloc_failed"),
    "watchdog": (32, "killed_limiter"),
    "none": (32, "exceeded"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_runtime_with_too_little_memory_does_not_live(kind: str, pocket: Path) -> None:
    limit, name = NOT_ENOUGH[kind]
    given = budget(limit)
    seen = run_pocket(kind, given, pocket)

    assert classify(seen, given).name == name, seen
    if kind != "none":
        assert seen.result is None and not seen.completed
    if kind == "rlimit_data":
        assert "not enough memory" in seen.message and seen.last_phase == "load"


@pytest.mark.parametrize("kind", KINDS)
def test_the_runtime_with_enough_memory_lives(kind: str, pocket: Path) -> None:
    given = budget(640)
    seen = run_pocket(kind, given, pocket)

    assert classify(seen, given).name == "fits", seen
    assert seen.result is not None and seen.result.tokens > 0
    assert seen.last_phase == "done"


def run_pocket(kind: str, given: Budget, pocket: Path) -> Trace:
    if reason := offered(given)[kind]:
        pytest.skip(f"{kind}: {reason}")
    job = Job.ask(pocket, "Open Settings", (sample_screenshot(),), max_tokens=24, threads=1)
    chosen = choose_enforcement(kind, given)  # type: ignore[arg-type]
    return run_inside(job, given, chosen, RunOptions(timeout_s=120, interval_s=0.02))
